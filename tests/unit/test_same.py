"""SAME: its linears written out in float64, the summed covariance against the whole one, the two maps against
plain loops, and the mask with what it must not do."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from method_support import START, Given, alone, seen_by_layers
from torch import Tensor

from delo_llava.data.segments import SEGMENT_OTHER
from delo_llava.errors import DeloError
from delo_llava.methods._same import Moments, Spectrum, acting, curved, probe, spectral
from delo_llava.methods.base import Clock
from delo_llava.methods.same import _read

E = 2
ROWS = [*items("task0"), *items("task1")[:2]]


class Kept:
    """`Trained` over given values, which notes what is rewritten."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.given, self.new = values, dict[str, Tensor]()

    def values(self) -> dict[str, Tensor]:
        return self.given

    def rewrite(self, new: dict[str, Tensor]) -> None:
        self.new = new

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def parts(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A and B by experts, E×ρ×d_in and E×d_out×ρ, and R, in float64."""
    a, b, r = (getattr(layer, f"lowrank_{side}")["default"].weight.detach().double() for side in "ABR")
    return a.unflatten(0, (E, -1)), b.unflatten(1, (E, -1)).transpose(0, 1), r


def update(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """s·(Σ_j g_j B_j)(Σ_i g_i A_i) x for x S×d, the matrices made whole."""
    a, b, _ = parts(layer)
    up, down = (sum(w * m for w, m in zip(weights, part, strict=True)) for part in (b, a))
    return layer.scale["default"] * x.double() @ down.T @ up.T  # type: ignore[no-any-return, union-attr]


def mean_weights(layer: Any, prompt: Tensor, temperature: float) -> Tensor:
    """p̄ of one row, token by token."""
    _, _, router = parts(layer)
    each = [(router @ token.double() / temperature).softmax(0) for token in prompt]
    return torch.stack(each).mean(0)


def begun(**options: Any) -> tuple[Bench, Any, Any]:
    """A first stage whose trained parameters are all of some size, with its method."""
    bench = Bench("same", **options)
    model = bench.begin(bench.stages()[0])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    method: Any = bench.method
    return bench, model, method


def rows_of(layer: Any, x: Tensor, batch: Any) -> list[Tensor]:
    """The tokens of each row that count for its weights."""
    kinds = batch.segments
    return [x[n] if layer.projector else x[n][kinds[n] != SEGMENT_OTHER] for n in range(len(x))]


@pytest.mark.parametrize("acts", [(True, True), (False, True)])
def test_training_mixes_the_experts_that_act(acts: tuple[bool, bool]) -> None:
    bench, model, method = begun(projector=True)
    batch = bench.batch(ROWS)
    method._masks[:] = torch.tensor(acts)
    _, seen = seen_by_layers(model, method, batch)
    assert {layer.projector for layer, _, _ in seen.values()} == {True, False}
    for layer, x, y in seen.values():
        for n, prompt in enumerate(rows_of(layer, x, batch)):
            gate = mean_weights(layer, prompt, 1.0) * torch.tensor(acts)
            expected = layer.base_layer(x[n]).double() + update(layer, x[n], gate / gate.sum())
            torch.testing.assert_close(y[n].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_answers_mix_the_largest_of_a_softer_softmax(top_k: int) -> None:
    told, bench = story("same"), Bench("same", top_k=top_k)
    model = bench.loaded(told.past(2))
    batch = bench.batch(ROWS)
    _, seen = seen_by_layers(model, bench.method, batch)
    other = 0
    for layer, x, y in seen.values():
        for n, prompt in enumerate(rows_of(layer, x, batch)):
            gate = mean_weights(layer, prompt, E)
            if top_k == 1:
                gate = torch.nn.functional.one_hot(gate.argmax(), E).double()
            base = layer.base_layer(x[n]).double()
            torch.testing.assert_close(y[n].double(), base + update(layer, x[n], gate), rtol=0, atol=2e-5)
            other += not torch.allclose(y[n].double(), base + update(layer, x[n], gate.flip(0)), atol=2e-5)
    assert other, "and which expert it is matters"


# ---- directions ----
def drawn(tokens: int, width: int, rank: int) -> Tensor:
    return torch.randn(tokens, rank) @ torch.randn(rank, width) + 3.0


def test_sums_of_parts_give_the_covariance_of_the_whole() -> None:
    """Over micro-batches, ranks and tasks; exact where the probe is as wide as what varies. The negative
    control is what the port keeps: the last part alone.
    """
    torch.manual_seed(0)
    x, known = drawn(50, 12, 5).double(), probe(12, 7, seed=3)
    whole = Moments.empty(12, 7)
    for part in x.split([3, 30, 17]):
        whole.add(Moments.of(part, known))
    spectrum = whole.spectrum(known)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    assert len(spectrum.spread) == 5
    torch.testing.assert_close(spectrum.spread, values.flip(0)[:5].sqrt(), rtol=1e-3, atol=0)
    expected = vectors.flip(1)[:, :5]
    found = spectrum.directions
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-4)
    last = Moments.empty(12, 7)
    last.add(Moments.of(x[-17:], known))
    assert not torch.allclose(last.spectrum(known).spread, spectrum.spread, rtol=1e-2)
    few = Moments.empty(12, 7)
    assert few.spectrum(known).spread.shape == (0,), "nothing was seen"
    few.add(Moments.of(x[:3], known))
    assert len(few.spectrum(known).spread) == 2, "three tokens vary in two directions, not in seven"


def test_what_a_stage_keeps_is_of_all_tokens_so_far() -> None:
    """Of the stages before, too: counts add up, and every real token is in them, template and answer too."""
    told = story("same")
    kept = [_read(done.folder) for done in told.trained]
    tokens = []
    for task in ("task0", "task1"):
        batch = told.bench.batch([*items(task), *list(items(task))])
        tokens.append(float(batch.inputs["attention_mask"].sum()))
    for name, moments in kept[1].items():
        before = kept[0][name]
        assert 0 < float(before.count) < float(moments.count)
        assert not torch.equal(before.products, moments.products), name
    own = float(kept[0][name].count)
    assert float(kept[1][name].count) - own == pytest.approx(own * tokens[1] / tokens[0], rel=0.2)


def test_the_curved_map_is_what_it_says() -> None:
    torch.manual_seed(1)
    basis, spread = (
        torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q,
        torch.tensor([4.0, 1.0, 0.1]).double(),
    )
    change, mu = torch.randn(2, 8, dtype=torch.float64), 0.9
    whole = basis @ torch.diag(1 / (spread + mu)) @ basis.T + (torch.eye(8) - basis @ basis.T) / mu
    torch.testing.assert_close(curved(change, Spectrum(basis, spread), mu), change @ whole)
    nothing = Spectrum(basis, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(curved(change, nothing, mu), change / mu)


def test_the_spectral_map_shortens_the_widest_directions_and_lengthens_none() -> None:
    torch.manual_seed(2)
    basis = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64)).Q
    spread = torch.tensor([3.0, 2.9, 2.0, 1.9, 1.5, 0.1]).double()
    change = torch.randn(4, 9, dtype=torch.float64)
    share, count = 0.0, 1
    for value in spread:
        share += float(value**2 / spread.square().sum())
        count += share <= 0.9
    smooth = [float(spread[max(0, i - 2) : i + 1].mean()) for i in range(count)]
    expected = change.clone()
    for i in range(count):
        scale = min(1.2, max(0.8, (1 / smooth[i]) / max(1 / s for s in smooth)))
        assert scale <= 1
        expected += (scale - 1) * torch.outer(change @ basis[:, i], basis[:, i])
    torch.testing.assert_close(spectral(change, Spectrum(basis, spread)), expected)
    assert 1 < count < 6
    assert spectral(change, Spectrum(basis[:, :0], spread[:0])) is change


# ---- the mask ----
def test_a_mask_is_by_load_against_energy_and_keeps_the_own_expert() -> None:
    """Where tokens are of one length, load and energy have one range and all but the own expert are dropped:
    why nothing is masked before the router was trained.
    """
    load = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.1, 0.5, 0.3, 0.1], [0.25] * 4])
    energy = torch.stack([7.0 * load[0], torch.tensor([0.9, 0.1, 0.2, 0.8]), load[2]])
    assert acting(load, energy, 3, 0.1).tolist() == [
        [False, False, False, True], [False, True, True, True], [False, False, False, True],
    ]  # fmt: skip


def masked_gradient(mask: list[bool]) -> tuple[float, float]:
    """Largest gradient of a router, and of an expert's A, under a mask."""
    bench, model, method = begun()
    method._masks[:] = torch.tensor(mask)
    batch = bench.batch(ROWS)
    method.loss_sums(model, batch)["answer"].backward()
    grads = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None}
    router, down = (max(v for n, v in grads.items() if f"lowrank_{s}" in n) for s in "RA")
    return router, down


def test_a_router_with_one_expert_left_learns_nothing() -> None:
    lone, all_of_them = masked_gradient([True, False]), masked_gradient([True, True])
    assert lone[0] < 1e-6 * lone[1] and all_of_them[0] > 1e-4 * all_of_them[1]


def counted_step(bench: Bench, model: Any, method: Any, clock: Clock) -> None:
    batch = bench.batch(ROWS)
    for _ in range(2):  # a recomputed forward tells the same once more
        terms = method.loss_sums(model, batch)
    terms["answer"].backward()
    method.after_backward(model, batch, clock)


def test_no_expert_is_dropped_before_the_first_steps_are_done() -> None:
    bench, model, method = begun(warmup=0.5)
    for step, masked in ((0, False), (3, False), (4, True)):
        clock = Clock(step, 10, 10)
        counted_step(bench, model, method, clock)
        method.after_step(Kept(method_values(model)), method_values(model), clock)
        assert bool(method._masks.all()) != masked, step
    assert bool(method._masks[:, method._own].all())


def method_values(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_running_means_are_of_the_rows_of_a_step() -> None:
    bench, model, method = begun()
    counted_step(bench, model, method, START)
    batch = bench.batch(ROWS)
    _, seen = seen_by_layers(model, method, batch)
    method.after_step(Kept(method_values(model)), method_values(model), START)
    for at, name in enumerate(method._sizes):
        layer, x, _ = seen[name]
        prompts = rows_of(layer, x, batch)
        load = torch.stack([mean_weights(layer, p, 1.0) for p in prompts]).mean(0)
        router = parts(layer)[2]
        each = [
            ((p.double() @ router.T).softmax(1) * p.double().square().sum(1, True)).mean(0) for p in prompts
        ]
        torch.testing.assert_close(method._load[at], 0.05 * load, rtol=1e-4, atol=0)
        torch.testing.assert_close(method._energy[at], 0.05 * torch.stack(each).mean(0), rtol=1e-4, atol=0)
        assert float(method._moments[name].count) == float(batch.inputs["attention_mask"].sum())
        assert method._chosen[at].tolist() == [6.0, 6.0], "of two experts, the two largest"


def test_a_step_that_made_no_update_is_not_counted() -> None:
    bench, model, method = begun()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    counted_step(bench, model, method, START)
    method.left_out(START)
    method.after_step(Kept(method_values(model)), method_values(model), Clock(1, 100, 10))
    counts = {n: t for n, t in method.state_dict().items() if n.startswith("sum/")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in counts.items())


# ---- updates ----
def test_updates_are_bent_whatever_made_them_and_masked_experts_keep_their_bits() -> None:
    told = story("same")
    bench = Bench("same")
    model = bench.method.begin(bench.base(), told.stages[1])
    method: Any = bench.method
    before = method_values(model)
    after = {name: value + torch.randn_like(value) for name, value in before.items()}
    method._masks[:, 0] = False
    held = Kept(after)
    method.after_step(held, before, START)
    for path, linear in method._paths.items():
        a, b, r = (f"{path}.lowrank_{side}.default.weight" for side in "ABR")
        size = len(before[a]) // E
        bent = curved((after[a] - before[a]).double(), method._past[linear], 0.9)
        torch.testing.assert_close(
            (held.new[a] - before[a])[size:].double(), bent[size:], rtol=1e-3, atol=1e-4
        )
        assert torch.equal(held.new[a][:size], before[a][:size])
        assert torch.equal(held.new[b][:, :size], before[b][:, :size])
        torch.testing.assert_close(held.new[b][:, size:], after[b][:, size:], rtol=0, atol=1e-6)
        assert not torch.allclose(bent, (after[a] - before[a]).double(), rtol=1e-2)
        turned = before[r] + spectral(after[r] - before[r], method._all[linear])
        assert torch.equal(held.new[r], turned) and not torch.equal(turned, after[r])


def test_what_is_kept_between_steps_is_all_of_it() -> None:
    bench, model, method = begun(refresh=1)
    counted_step(bench, model, method, START)
    method.after_step(Kept(method_values(model)), method_values(model), START)
    # A file gives tensors back row by row, and a product's last bits depend on that.
    state = {name: tensor.contiguous().clone() for name, tensor in method.state_dict().items()}
    _, other, again = begun(refresh=1)
    again.load_state_dict(other, state)
    found = again.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)
    assert any(name.startswith("directions/") for name in state)
    before = method_values(model)
    after = {name: value + torch.randn_like(value) for name, value in before.items()}
    one, two = method._bent(before, after), again._bent(before, after)
    assert one and one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    method.finish(model, Given(), alone)
    again.finish(other, Given(), alone)
    assert all(torch.equal(method._moments[n].sums, again._moments[n].sums) for n in method._sizes)


def test_options_that_do_not_fit_are_refused_and_shared_experts_are_told() -> None:
    with pytest.raises(DeloError, match="multiple of the number of experts"):
        Bench("same", rank=6, experts=4)
    with pytest.raises(DeloError, match="cannot act"):
        Bench("same", rank=8, experts=4, top_k=5)
    method = Bench("same").method
    assert method.remarks(dict.fromkeys("ab")) == []  # type: ignore[arg-type]
    assert "b, c share" in method.remarks(dict.fromkeys("abc"))[0]  # type: ignore[arg-type]
