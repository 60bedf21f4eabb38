"""HiDe-LLaVA and DISCO: every linear against the sums written out in float64, the weights against the
softmax of cosines, and what follows from one task, from one weight and from a missing modality."""

from typing import Any

import pytest
import torch
from contract_support import Bench, Story, items, story
from method_support import seen_by_layers
from torch import Tensor

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.methods.hide import number_of

ROWS = [*items("task0"), *items("task1")[:2]]


def told(name: str) -> tuple[Story, Any]:
    """A story and its model after both tasks."""
    found = story(name)
    return found, found.bench.loaded(found.past(2))


def factors(layer: LowRankLayer, name: str) -> tuple[Tensor, Tensor]:
    """A and s·B of a task in float64."""
    a, b = (getattr(layer, f"lowrank_{side}")[name].weight.double() for side in "AB")
    return a, b * layer.scale[name]


def reference(method: str, options: Any, layer: LowRankLayer, x: Tensor, w: Tensor, last: int) -> Tensor:
    """What one row adds; x: S×d, w: T."""
    pairs = [factors(layer, name) for name in ("task0", "task1")]
    mixed = method == "disco" or (not layer.projector and number_of(layer.name) == last)
    if mixed:
        return sum(float(w[i]) * x @ a.T @ b.T for i, (a, b) in enumerate(pairs))  # type: ignore[return-value]
    if options.cross_terms:
        return x @ sum(a for a, _ in pairs).T @ sum(b for _, b in pairs).T  # type: ignore[union-attr]
    return sum(x @ a.T @ b.T for a, b in pairs)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "cross"), [("hide", False), ("hide", True), ("disco", False)])
def test_every_linear_is_what_the_paper_writes(name: str, cross: bool) -> None:
    found = story(name)
    bench = Bench(name, **({"cross_terms": cross} if name == "hide" else {}))
    model, method = bench.loaded(found.past(2)), bench.method
    batch = bench.batch(ROWS)
    plan, seen = seen_by_layers(model, method, batch)
    images = batch.image_rows.tolist()
    last = max(number_of(name) for name in seen if "layers." in name)
    assert last == 1 and len(seen) == 16
    others = 0
    for layer, x, y in seen.values():
        for i in range(len(x)):
            w = plan.values["tasks"][images[i] if layer.projector else i]
            expected = layer.base_layer(x[i]).double() + reference(
                name, bench.method.options, layer, x[i].double(), w, last
            )
            torch.testing.assert_close(y[i].double(), expected, rtol=0, atol=2e-5)
            turned = layer.base_layer(x[i]).double() + reference(
                name, bench.method.options, layer, x[i].double(), w.flip(0), last
            )
            others += not torch.allclose(y[i].double(), turned, atol=2e-5)
    assert others, "the weights matter"


@pytest.mark.parametrize("name", ["hide", "disco"])
def test_weights_are_the_softmax_of_mean_cosines_over_what_is_shown(name: str) -> None:
    found, model = told(name)
    method: Any = found.bench.method
    batch = found.bench.batch(ROWS)
    plan, _ = seen_by_layers(model, method, batch)
    queries = frozen_queries(model, method.inputs(batch), batch.inputs)
    views = {"image": 0, "text": 1, "instruction": 2}
    for row in range(len(ROWS)):
        cosines = []
        for task in ("task0", "task1"):
            anchors = method._anchors.tasks[task].means()
            found_views = []
            for view in method.options.views:
                if view == "image" and not batch.presence[row, 0]:
                    continue
                q, a = queries[views[view]][row].double(), anchors[views[view]]
                found_views.append((q @ a / q.norm() / a.norm()).item())
            cosines.append(sum(found_views) / len(found_views))
        expected = (torch.tensor(cosines, dtype=torch.float64) / method.options.temperature).softmax(0)
        torch.testing.assert_close(plan.values["tasks"][row].double(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(plan.values["tasks"].sum(1), torch.ones(len(ROWS)))


@pytest.mark.parametrize("name", ["hide", "disco"])
def test_anchors_are_means_over_the_samples_that_have_the_view(name: str) -> None:
    found, model = told(name)
    method: Any = found.bench.method
    for task in ("task0", "task1"):
        kept = method._anchors.tasks[task]
        assert kept.count.tolist() == [6, 6, 8], "eight examples once, whatever the epochs"
    batch = found.bench.batch(items("task0"))
    # The instruction is the same in all of a task's samples, so it is their mean.
    words = frozen_queries(model, method.inputs(batch), batch.inputs).instruction[0].double()
    torch.testing.assert_close(method._anchors.tasks["task0"].means()[2], words, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["hide", "disco"])
def test_one_task_is_its_own_adapter(name: str) -> None:
    """A weight of one: the mixture and the sum are both that task's LoRA."""
    found = story(name)
    alone = found.bench.loaded(found.past(1))
    rows = items("task0")
    inside = found.bench.logits(found.trained[0].model, rows, trained=True)
    assert torch.equal(found.bench.logits(alone, rows), inside)


def test_without_a_top_layer_nothing_is_weighed_and_everywhere_it_is_disco() -> None:
    found = story("hide")
    plain, whole = Bench("hide", top_layers=0), Bench("hide", top_layers=2)
    rows = items("task0")
    models = [bench.loaded(found.past(2)) for bench in (plain, whole, found.bench)]
    logits = [
        bench.logits(model, rows) for bench, model in zip((plain, whole, found.bench), models, strict=True)
    ]
    assert not torch.equal(logits[0], logits[2]) and not torch.equal(logits[1], logits[2])
    method: Any = plain.method
    assert not method._top and whole.method._top == {0, 1}  # type: ignore[attr-defined]


def test_a_row_s_weights_do_not_hang_on_its_company() -> None:
    found, model = told("hide")
    method: Any = found.bench.method
    whole = seen_by_layers(model, method, found.bench.batch(ROWS))[0].values["tasks"]
    for row, item in enumerate(ROWS):
        lone = seen_by_layers(model, method, found.bench.batch([item]))[0].values["tasks"]
        torch.testing.assert_close(lone[0], whole[row], rtol=0, atol=1e-6)
