"""EWC: the two sums written out in float64, Fisher information record by record, what λ does."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, Story, Trained, items, story
from method_support import START, Given, alone
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.own import TENSORS
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.ewc import FISHER, in_file, penalty, quadratic

Tensors = dict[str, Tensor]


def drawn(count: int) -> tuple[list[Tensors], list[Tensors]]:
    """F and weights of some stages; some F are 0 everywhere, some in one stage."""
    random = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    fishers = [{n: torch.rand(shape, generator=random) for n, shape in shapes.items()} for _ in range(count)]
    for fisher in fishers:
        fisher["a"][0] = 0
    fishers[0]["b"][1] = 0
    ends = [{n: torch.randn(shape, generator=random) for n, shape in shapes.items()} for _ in fishers]
    return fishers, ends


def by_hand(theta: Tensors, fishers: list[Tensors], ends: list[Tensors], kind: str, decay: float) -> float:
    """The penalty of the paper, entry by entry."""
    total = 0.0
    for j, fisher in enumerate(fishers):
        anchor = ends[j] if kind == "per_task" else ends[-1]
        factor = 0.5 * decay ** (len(fishers) - 1 - j)
        for name, f in fisher.items():
            entries = zip(theta[name].flatten(), f.flatten(), anchor[name].flatten(), strict=True)
            total += sum(factor * float(w) * (float(value) - float(end)) ** 2 for value, w, end in entries)
    return total


@pytest.mark.parametrize("kind", ["per_task", "online"])
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("count", [1, 3])
def test_one_quadratic_stands_for_all_stages(kind: str, decay: float, count: int) -> None:
    """Up to a constant, which has no gradient, and none at all where there is one anchor."""
    fishers, ends = drawn(count)
    thetas, _ = drawn(4)
    known = quadratic(fishers, ends, kind, decay)
    ours = [float(penalty(theta, *known)) for theta in thetas]
    theirs = [by_hand(theta, fishers, ends, kind, decay) for theta in thetas]
    for (a, b), (c, d) in zip(pairwise(ours), pairwise(theirs), strict=True):
        assert a - b == pytest.approx(c - d, abs=1e-5)
    if kind == "online" or count == 1:
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert all(t.isfinite().all() for part in known for t in part.values())


def test_the_two_forms_differ_and_none_is_empty() -> None:
    fishers, ends = drawn(2)
    one, other = (quadratic(fishers, ends, kind, 1.0)[1] for kind in ("per_task", "online"))
    assert not torch.allclose(one["b"], other["b"])
    assert torch.equal(one["a"][0], ends[-1]["a"][0])  # where no stage needs anything
    assert quadratic([], [], "online", 1.0) == ({}, {})


def test_the_gradient_pulls_to_the_anchor() -> None:
    fishers, ends = drawn(1)
    theta = {name: torch.ones_like(end, requires_grad=True) for name, end in ends[0].items()}
    penalty(theta, fishers[0], ends[0]).backward()
    for name, value in theta.items():
        assert torch.allclose(value.grad, fishers[0][name] * (1 - ends[0][name]))  # type: ignore[arg-type]


def prepared() -> tuple[Bench, Any, list[Any]]:
    """A model at the start of a stage whose B are drawn, and four records, each a batch of its own."""
    bench = Bench("ewc", rank=2)
    model = bench.begin(Stage(0, "task0"))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    return bench, model, [bench.batch([item]) for item in items("task0")]


def test_fisher_information_is_the_mean_of_each_record_s_squared_gradient() -> None:
    bench, model, batches = prepared()
    bench.method.finish(model, Given(batches), alone)
    found = bench.method._own  # type: ignore[attr-defined]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    squares = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    means = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    for batch in batches:
        model.zero_grad()
        logits = model(**batch.inputs).logits[:, :-1].double()
        labels = batch.labels[:, 1:]
        at = labels != -100
        (-logits.log_softmax(-1)[at].gather(1, labels[at][:, None]).mean()).backward()
        for name, value in named.items():
            if value.grad is not None:
                squares[name] += value.grad.double() ** 2 / len(batches)
                means[name] += value.grad.double() / len(batches)
    assert found.keys() == {in_file(name) for name in named}
    for name in named:
        assert torch.allclose(found[in_file(name)].double(), squares[name], rtol=1e-3, atol=1e-12), name
    signed = sum(float((means[n] ** 2).sum()) for n in named)
    assert sum(float(f.sum()) for f in found.values()) > 1.5 * signed  # signs would cancel


def test_ranks_add_their_parts() -> None:
    bench, model, batches = prepared()
    bench.method.finish(model, Given(batches), alone)
    whole = dict(bench.method._own)  # type: ignore[attr-defined]
    parts: list[list[Tensor]] = []
    for share in (batches[:3], batches[3:]):
        sums: list[Tensor] = []
        bench.method.finish(model, Given(share), lambda t, sums=sums: (sums.append(t.clone()), t)[1])  # type: ignore[misc]
        parts.append(sums)
    added = iter([a + b for a, b in zip(*parts, strict=True)])
    bench.method.finish(model, Given(batches[:1]), lambda t: next(added))
    again = bench.method._own  # type: ignore[attr-defined]
    assert all(torch.allclose(again[n], value) for n, value in whole.items())


# ---- stages ----
def test_the_first_stage_has_no_penalty_and_every_stage_leaves_its_own_information() -> None:
    told = story("ewc")
    bench = Bench("ewc")
    model = bench.begin(told.stages[0])
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert bench.method.penalties(values, START) == {}
    for done in told.trained:
        fisher, adapter = load_file(done.folder / FISHER), load_file(done.folder / TENSORS)
        assert {n: t.shape for n, t in fisher.items()} == {n: t.shape for n, t in adapter.items()}
        assert all((f >= 0).all() for f in fisher.values())
        assert sum(bool(f.any()) for f in fisher.values()) == len(
            fisher
        )  # not the zeros of unreduced gradients
        stored = sum(4 * f.numel() for f in fisher.values())
    assert bench.method.footprint(bench.base()).stored_bytes == stored


def test_at_the_start_of_a_stage_the_penalty_is_zero_and_then_grows() -> None:
    told = story("ewc")
    bench = Bench("ewc")
    stage = told.stages[1]
    model = bench.begin(stage)
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert float(bench.method.penalties(values, START)["ewc"]) == 0
    fisher = load_file(told.trained[0].folder / FISHER)
    moved = {n: v + 0.5 for n, v in values.items()}
    expected = sum(0.125 * float(f.double().sum()) for f in fisher.values())
    assert float(bench.method.penalties(moved, START)["ewc"]) == pytest.approx(expected, rel=1e-3)
    assert bench.method.weights(START)["ewc"] == 5000


def second(folder: Path, told: Story, **options: Any) -> Trained:
    """The second stage of a story, trained by other options."""
    past = {told.stages[0].name: Past(told.trained[0].folder, told.stages[0].tasks)}
    first = told.stages[1]
    return Bench(**options).train(Stage(1, first.name, first.tasks, past, first.seed), folder)


def test_a_strength_of_zero_is_lora_and_a_large_one_holds(tmp_path: Path) -> None:
    told = story("ewc")
    free = second(tmp_path / "free", told, name="ewc", strength=0.0)
    lora = second(tmp_path / "lora", told, name="lora")
    held = second(tmp_path / "held", told, name="ewc", strength=1e9)
    assert all(torch.equal(value, free.end[name]) for name, value in lora.end.items())
    fisher = load_file(told.trained[0].folder / FISHER)

    def moved(done: Trained) -> float:
        return sum(
            float((fisher[in_file(n)] * (value - done.start[n]) ** 2).sum()) for n, value in done.end.items()
        )

    assert moved(held) < 0.5 * moved(lora)
