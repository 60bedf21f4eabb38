"""DAC: rank-one experts against sums written out in float64, choices per sample, counts, AGO, what is
kept."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, Story, items, records, story
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.carrier import routing
from delo_llava.adapters.lowrank import LowRankLayer, RowPlan
from delo_llava.adapters.own import TENSORS
from delo_llava.engines.single import SingleTrained
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.base import Clock, Past, Stage
from delo_llava.methods.dac import EXPERTS, Dac, ExpertRouter, overlap
from delo_llava.strict import read_json

R, K, KEPT = 6, 4, 2
ROWS = items("task0")


def begun(past: Mapping[str, Any] | None = None, **options: Any) -> tuple[Bench, Any]:
    """A bench and the model that a stage begins with, whose B are drawn."""
    bench = Bench("dac", **options)
    model = bench.begin(Stage(1 if past else 0, "now", past=past or {}, seed=3))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lowrank_B.now" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return bench, model


def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def planned(bench: Bench, model: Any, rows: Any) -> RowPlan:
    batch = bench.batch(rows)
    with torch.no_grad(), routing(model, RouteInputs.from_batch(batch)) as route:
        model(**batch.inputs)
    plan: RowPlan = route.plan
    return plan


def chosen(bench: Bench, model: Any, rows: Any) -> Tensor:
    found: Tensor = planned(bench, model, rows).extra["chosen"]
    return found


def two_stages() -> Story:
    """Shared by the tests of this process."""
    return story("dac")


# ---- the function ----
def test_each_row_has_its_own_experts_beside_what_was_kept() -> None:
    """Every linear against Σ_{i∈S} s·b_i(a_i·x), and the experts kept before, in float64."""
    told = two_stages()
    bench, model = begun(told.past(2))
    batch = bench.batch(ROWS)
    route = RouteInputs.from_batch(batch)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers(model):
        layer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.name, (args[0], out)))
    with torch.no_grad(), routing(model, route) as entered:
        model(**batch.inputs)
    stored = [load_file(done.folder / TENSORS) for done in told.trained]
    for number, layer in enumerate(layers(model)):
        x, y = seen[layer.name]
        a, b = (t.double() for t in layer.pair("now"))
        for i in range(len(x)):
            row = int(route.image_rows[i]) if layer.projector else i
            own = entered.plan.extra["chosen"][row, number]
            assert own.sum() == K
            delta = b[:, own] @ a[own]
            for past in stored:
                key = f"base_model.model.{layer.name}.lowrank_"
                assert past[f"{key}A.weight"].shape[0] == KEPT
                delta = delta + past[f"{key}B.weight"].double() @ past[f"{key}A.weight"].double()
            expected = layer.base_layer(x[i]).double() + 2.0 * x[i].double() @ delta.T
            assert torch.allclose(y[i].double(), expected, atol=1e-5), layer.name


def test_only_chosen_experts_get_a_gradient_and_the_router_learns() -> None:
    bench, model = begun()
    row = bench.batch(ROWS[:1])
    sums = bench.method.loss_sums(model, row)
    active = planned(bench, model, ROWS[:1]).extra["chosen"][0]
    sums["answer"].backward()
    for layer, mine in zip(layers(model), active, strict=True):
        grads = [getattr(layer, f"lowrank_{side}")["now"].weight.grad for side in "AB"]
        assert [int(g.abs().sum(d).count_nonzero()) for g, d in zip(grads, (1, 0), strict=True)] == [K, K]
        assert not grads[0][~mine].any() and not grads[1][:, ~mine].any()
    router = bench.method._router
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())


def test_the_gate_changes_no_value_and_a_frozen_router_has_no_gradient() -> None:
    (one, learned), (two, frozen) = begun(), begun(router="frozen_random")
    assert [p.requires_grad for p in two.method._router.parameters()] == [False] * 3
    for mine, theirs in zip(one.method._router.parameters(), two.method._router.parameters(), strict=True):
        assert torch.equal(mine, theirs), "drawn from the stage's seed"
    gates, picks = (
        torch.stack(list(planned(one, learned, ROWS).values.values()), 1),
        chosen(two, frozen, ROWS),
    )
    assert torch.equal(gates, picks.float()), "values are exactly one and zero"
    assert torch.equal(*(bench.logits(m, ROWS) for bench, m in ((one, learned), (two, frozen))))


# ---- choices ----
def test_a_choice_is_the_sample_s_own() -> None:
    """Company, padding and the answer change nothing; another image, or words where there is none, do."""
    bench, model = begun()
    whole = chosen(bench, model, ROWS)
    assert not torch.equal(whole[0], whole[2])
    for row, expected in zip(ROWS, whole, strict=True):
        assert torch.equal(chosen(bench, model, [row])[0], expected)
    record = ROWS[0][0]

    def one(presence: tuple[bool, bool], **changes: Any) -> Tensor:
        return chosen(bench, model, [(replace(record, **changes), presence)])[0]

    other = records("task0")[1]
    assert torch.equal(one((True, True), answer="green green green"), whole[0])
    assert torch.equal(one((True, True), context=other.context, instruction="say it"), whole[0]), "the image"
    assert not torch.equal(one((True, True), image=other.image), whole[0])
    assert torch.equal(one((False, True), image=other.image), one((False, True)))
    assert not torch.equal(one((False, True), context="an animal food travel capital"), one((False, True)))
    assert not torch.equal(one((False, False)), one((False, True))), "the instruction speaks alone"


def test_ties_go_to_the_first_experts() -> None:
    router = ExpertRouter(8, 4, 3, R)
    for parameter in router.parameters():
        parameter.data.zero_()
    _, picks = router(torch.randn(2, 8), K)
    assert picks.int().tolist() == [[[1] * K + [0] * (R - K)] * 3] * 2


# ---- counts and phases ----
class Doubled(SingleTrained):
    """Two ranks that count alike."""

    def sum(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


def step(bench: Bench, model: Any, clock: Clock, trained: Any, backward: bool = True) -> None:
    """What the loop does in a step of one micro-batch."""
    method, batch = bench.method, bench.batch(ROWS)
    sums = method.loss_sums(model, batch)
    sums["answer"].backward()
    if backward:
        method.after_backward(model, batch, clock)
    method.before_step(trained, clock)


def test_choices_are_counted_once_over_all_ranks_between_the_phases() -> None:
    bench, model = begun(uncounted=0.25, settled=0.25)
    trained, counts = Doubled({}, None), []
    for number in range(8):
        step(bench, model, Clock(number, 8, 8), trained)
        counts.append(bench.method.state_dict()["counts"].sum(1))
    each = 2 * len(ROWS) * K
    assert [c.unique().tolist() for c in counts] == [[n * each] for n in (0, 0, 1, 2, 3, 4, 4, 4)]
    bench.answers(model.eval(), ROWS)
    bench.method.before_step(trained, Clock(3, 8, 8))
    step(bench, model, Clock(3, 8, 8), trained, backward=False)
    assert torch.equal(bench.method.state_dict()["counts"].sum(1), counts[-1]), "answers and fillers never do"


@pytest.mark.parametrize(("steps", "phases"), [(1, (0, 1)), (2, (0, 1)), (4, (0, 3)), (100, (10, 80))])
def test_a_stage_of_any_length_counts_before_it_settles(steps: int, phases: tuple[int, int]) -> None:
    method: Any = begun()[0].method
    assert method._phases(steps) == phases


def test_settled_steps_train_the_most_used_experts_alone() -> None:
    bench, model = begun()
    method: Any = bench.method
    drawn = torch.Generator().manual_seed(1)
    counts = torch.randint(9, (len(layers(model)), R), generator=drawn)
    method.load_state_dict(model, {"counts": counts, "settled": torch.tensor(True)})
    expected = torch.zeros_like(counts).bool()
    for row, mine in zip(counts.tolist(), expected, strict=True):
        for i in sorted(range(R), key=lambda i: (-row[i], i))[:KEPT]:
            mine[i] = True
    picks = chosen(bench, model, ROWS)
    assert all(torch.equal(row, expected) for row in picks)
    method.loss_sums(model, bench.batch(ROWS))["answer"].backward()
    for parameter in method._router.parameters():
        assert parameter.grad is not None and not parameter.grad.any(), "zero, and there (ZeRO-3)"
    for layer, mine in zip(layers(model), expected, strict=True):
        grad = layer.pair("now")[0].grad
        assert grad is not None and not grad[~mine].any() and grad[mine].abs().sum(1).all()


def test_a_stage_that_goes_on_knows_its_counts_and_phase() -> None:
    (one, model), (two, other) = begun(), begun()
    step(one, model, Clock(3, 5, 5), SingleTrained({}, None))
    state = one.method.state_dict()
    assert state["settled"] and state["counts"].dtype == torch.int64 and state["counts"].any()
    two.method.load_state_dict(other, {name: t.clone() for name, t in state.items()})
    assert torch.equal(chosen(one, model, ROWS), chosen(two, other, ROWS))
    assert all(torch.equal(t, two.method.state_dict()[name]) for name, t in state.items())


# ---- orthogonality ----
def penalty(method: Any, model: Any, steps: int = 10) -> tuple[Tensor | None, dict[str, Tensor]]:
    values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    return method.penalties(values, Clock(0, steps, steps)).get("ago"), values


@pytest.mark.parametrize("sides", [("A", "B"), ("B",)])
def test_ago_is_the_sum_of_absolute_products_of_key_experts(sides: tuple[str, ...]) -> None:
    told = two_stages()
    bench, model = begun(told.past(2), ago_sides=sides)
    method: Any = bench.method
    assert penalty(method, model)[0] is None, "without counts no expert is a key one"
    method._counts = torch.randint(9, (len(layers(model)), R), generator=torch.Generator().manual_seed(1))
    found, values = penalty(method, model)
    assert found is not None
    stored = [load_file(done.folder / TENSORS) for done in told.trained]
    total = 0.0
    for layer, counts in zip(layers(model), method._counts.tolist(), strict=True):
        key = sorted(range(R), key=lambda i: (-counts[i], i))[:KEPT]
        a, b = (t.detach().double() for t in layer.pair("now"))
        for past in stored:
            name = f"base_model.model.{layer.name}.lowrank_"
            a_past, b_past = (past[f"{name}{side}.weight"].double() for side in "AB")
            for i in key:
                for j in range(KEPT):
                    total += abs(float(a[i] @ a_past[j])) * ("A" in sides)
                    total += abs(float(b[:, i] @ b_past[:, j])) * ("B" in sides)
    assert abs(float(found.detach()) - total / len(layers(model))) < 1e-4 * total
    grads = torch.autograd.grad(found, list(values.values()), allow_unused=True)
    for name, grad in zip(values, grads, strict=True):
        if "router" in name or ("lowrank_A" in name and "A" not in sides):
            assert grad is None
            continue
        assert grad is not None
        moved = grad.abs().sum(1 if "lowrank_A" in name else 0).count_nonzero()
        assert moved == KEPT, "only key experts move"


def test_ago_begins_with_the_second_stage() -> None:
    for past, weight in (({}, 0.1), (two_stages().past(1), 0.0), (two_stages().past(1), 0.1)):
        bench, model = begun(past, ago=weight)
        method: Any = bench.method
        method._counts = torch.ones_like(method._counts)
        assert (penalty(method, model)[0] is not None) == bool(past and weight)


def test_an_overlap_is_zero_only_where_all_are_orthogonal() -> None:
    one = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert overlap(one, torch.tensor([[0.0, 0.0, 5.0]])) == 0
    opposite = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    assert overlap(one, opposite) == 2 and (one @ opposite.T).mean() == 0, "a signed mean would not see it"
    assert overlap(one, -opposite) > 0


# ---- what is kept ----
def test_what_is_kept_are_the_most_used_experts_as_they_were_trained() -> None:
    told = two_stages()
    for done in told.trained:
        facts = read_json(done.folder / EXPERTS, "The experts", "")
        stored = load_file(done.folder / TENSORS)
        assert len(stored) == 2 * len(facts), "no router is kept"
        for name, fact in facts.items():
            order = sorted(range(R), key=lambda i: (-fact["counts"][i], i))
            assert fact["kept"] == sorted(order[:KEPT])
            stage = done.folder.name
            whole = done.end[f"base_model.model.{name}.lowrank_A.{stage}.weight"]
            assert torch.equal(stored[f"base_model.model.{name}.lowrank_A.weight"], whole[fact["kept"]])


@pytest.mark.parametrize("scale", [2.0, 1 / 12])
def test_any_number_of_stages_is_one_pair_beside_the_last(scale: float, tmp_path: Path) -> None:
    """Put together they add what they add one by one; a scale of any kind survives its files bit by bit."""
    bench, past = Bench("dac", alpha_over_rank=scale), dict[str, Past]()
    for i in range(3):
        stage = Stage(i, f"s{i}", bench.stages()[0].tasks, dict(past), seed=i)
        done = bench.train(stage, tmp_path / stage.name)
        past[stage.name] = Past(done.folder, stage.tasks)
        assert torch.equal(bench.logits(done.model, ROWS), bench.logits(bench.loaded(dict(past)), ROWS))
    model = bench.loaded(past)
    assert set(model.peft_config) == {"earlier_stages", "s2"}
    for layer in layers(model):
        deltas = [b.double() @ a.double() * scale for a, b in map(layer.pair, ("earlier_stages", "s2"))]
        parts = [load_file(known.folder / TENSORS) for known in past.values()]
        key = f"base_model.model.{layer.name}.lowrank_"
        expected = sum(p[f"{key}B.weight"].double() @ p[f"{key}A.weight"].double() * scale for p in parts)
        assert torch.allclose(sum(deltas), expected, atol=1e-7)


def test_a_matched_rank_counts_the_router() -> None:
    bench = Bench("dac", rank="match", like="lora")
    target = Bench("lora", rank=16)
    bench.config.methods["lora"] = {"rank": 16}
    wanted = target.method.footprint(target.base()).parameters
    method: Any = bench.method
    assert isinstance(method, Dac)
    got = method.footprint(bench.base()).parameters
    one_more = Bench("dac", rank=method.config(bench.base()).r + 1).method.footprint(bench.base()).parameters
    assert abs(got - wanted) <= abs(one_more - wanted)
