"""CRAM: weights and updates written out in float64, the cut of a buffer to a slot, the groups of tasks, and
what each phase trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from method_support import Given, alone, seen_by_layers
from torch import Tensor

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.adapters.lowrank import lowrank
from delo_llava.methods._cram import Cut, basis_of, centred, group_of, slot_of
from delo_llava.methods.base import Clock, Past, Stage

ROWS = [*items("task0"), *items("task1")[:2]]
TASKS = ("task0", "task1")
WHOLE = Cut(rank=8, least=0, strength=0.0, novelty=0.0)


def loaded(**options: Any) -> tuple[Bench, Any]:
    """The model after both tasks."""
    told = story("cram")
    bench = Bench("cram", **options)
    return bench, bench.loaded(told.past(2))


# ---- what answers ----
def test_every_linear_is_what_the_paper_writes() -> None:
    """Both tasks' instructions are alike, so they are one group here."""
    bench, model = loaded()
    method: Any = bench.method
    assert method._groups == {"task0": 0, "task1": 0}
    batch = bench.batch(ROWS)
    _, seen = seen_by_layers(model, method, batch)
    queries = frozen_queries(model, method.inputs(batch), batch.inputs).image.double()
    images, unequal = batch.image_rows.tolist(), 0
    assert len(seen) == 2 * 4 + 2
    for layer, x, y in seen.values():
        centroids = torch.cat([layer.lowrank_H[t]["centroid"].weight.double() for t in TASKS])
        for n in range(len(x)):
            row = images[n] if layer.projector else n
            far = (queries[row] - centroids).square().sum(1) * float(batch.presence[row, 0])
            weight = (-far / (2 * bench.method.options.spread**2)).softmax(0)
            unequal += not torch.allclose(weight, weight.flip(0), atol=1e-3)
            expected = layer.base_layer(x[n]).double()
            for w, task in zip(weight, TASKS, strict=True):
                a, b = (getattr(layer, f"lowrank_{side}")[task].weight.double() for side in "AB")
                expected = expected + 2.0 * w * x[n].double() @ a.T @ b.T
            torch.testing.assert_close(y[n].double(), expected, rtol=0, atol=2e-5)
    assert unequal, "with an image the centroids matter"


def test_slots_of_another_group_have_no_weight() -> None:
    bench, model = loaded()
    method: Any = bench.method
    method._groups = {"task0": 0, "task1": 1}
    batch = bench.batch(ROWS)
    plan, seen = seen_by_layers(model, method, batch)
    near = [0, 0, 0, 0, 1, 1]  # the instruction names the task, so its prototype is the nearest
    assert plan.values["slots"].tolist() == [[n == 0, n == 1] for n in near]
    for layer, x, y in seen.values():
        if layer.projector:
            continue
        for row, of in enumerate(near):
            a, b = (getattr(layer, f"lowrank_{side}")[TASKS[of]].weight.double() for side in "AB")
            expected = layer.base_layer(x[row]).double() + 2.0 * x[row].double() @ a.T @ b.T
            torch.testing.assert_close(y[row].double(), expected, rtol=0, atol=2e-5)


def test_weights_are_a_sample_s_own_unless_the_batch_is_asked_for() -> None:
    """Trap T1: the released code routes by the batch's mean."""
    for transductive in (False, True):
        bench, model = loaded(transductive=transductive)
        assert bench.method.capabilities.transductive == transductive
        whole = seen_by_layers(model, bench.method, bench.batch(ROWS))[0].values["query"]
        alone_ = seen_by_layers(model, bench.method, bench.batch(ROWS[:1]))[0].values["query"]
        assert torch.allclose(whole[0], alone_[0], atol=1e-6) == (not transductive)


# ---- the cut ----
def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A buffer of rank 8 on a linear of 12 inputs and 10 outputs."""
    torch.manual_seed(seed)
    return torch.randn(8, 12), torch.randn(10, 8)


def test_nothing_cut_is_the_same_function() -> None:
    """Trap T2: the scale enters once, so the update does not jump at the switch."""
    down, up = drawn()
    a, b = slot_of(down, up, 2.0, None, WHOLE)
    torch.testing.assert_close(2.0 * b @ a, 2.0 * up @ down, rtol=0, atol=1e-4)


def test_a_cut_keeps_the_strongest_and_leaves_zeros() -> None:
    down, up = drawn()
    u, sigma, v = torch.linalg.svd(2.0 * (up @ down).double())
    cut = Cut(rank=6, least=2, strength=float(sigma[3] + sigma[4]) / 2, novelty=0.9)
    a, b = slot_of(down, up, 2.0, None, cut)
    best = u[:, :4] @ sigma[:4].diag() @ v[:4]
    torch.testing.assert_close((2.0 * b @ a).double(), best, rtol=0, atol=1e-4)
    assert not a[4:].any() and not b[:, 4:].any()
    few = slot_of(down, up, 2.0, None, Cut(6, 3, 1e9, 0.9))[0]
    assert int(few.any(1).sum()) == 3, "at least so many, the strongest"


def test_a_slot_reads_nothing_of_what_earlier_ones_read() -> None:
    """Trap T4: what fills a slot up is new, too."""
    down, up = drawn()
    earlier = torch.cat([drawn(1)[0][:3], torch.zeros(2, 12)])
    basis = basis_of([earlier, down[:1]])
    assert basis is not None and basis.shape == (4, 12)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    a, b = slot_of(down, up, 2.0, basis, Cut(8, 8, 0.08, 0.99))
    assert (a.double() @ basis.T).abs().max() < 1e-5
    assert 4 <= int(a.any(1).sum()) <= 8 and torch.isfinite(b).all()
    inside = slot_of(basis[:2].float(), torch.randn(10, 2), 2.0, basis, Cut(4, 4, 0.0, 0.99))
    assert not inside[0].any() and not inside[1].any(), "nothing of it is new"
    assert basis_of([]) is None and basis_of([torch.zeros(2, 3)]) is None


# ---- the groups ----
def test_tasks_join_the_group_that_is_clearly_nearest() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    def joins(z: list[float], *groups: Tensor, most: int = 5) -> int:
        made = torch.stack(groups) if groups else torch.zeros(0, 0)
        return group_of(torch.tensor(z), made, 0.8, 0.1, most)

    assert joins([1, 0]) == 0
    assert joins([1, 0.1], east) == 0 and joins([0.3, 1], east) == 1
    assert joins([0.1, 1], east, north) == 1 and joins([1, 1.05], east, north) == 2
    assert joins([1, 1.05], east, north, most=2) == 1
    z = centred(torch.tensor([[1.0, 2.0, 6.0]]))
    assert z.sum().abs() < 1e-5 and z.square().mean() == pytest.approx(1.0, abs=1e-4)


# ---- a stage ----
def test_the_buffer_trains_first_and_is_cut_once(tmp_path: Path) -> None:
    """Phase by phase: what has a gradient, when the switch comes, and that the function goes on."""
    bench = Bench("cram", slot_rank=8, least_rank=8, strength=0.0, rank=6, warmup=0.05)
    told = story("cram")
    stage = told.stages[0]
    model = bench.begin(stage)
    method: Any = bench.method
    batch = bench.batch(items("task0"))
    method.prepare(model, Given([batch]), alone)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lowrank_B.the-buffer" in name:
                parameter.normal_(std=0.05)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss() -> Tensor:
        for parameter in named.values():
            parameter.grad = None
        found: Tensor = method.loss_sums(model, batch)["answer"]
        found.backward()
        assert all(p.grad is not None for p in named.values()), "all of them, in both phases"
        return found.detach()

    def moving() -> set[str]:
        return {n for n, p in named.items() if bool(p.grad.any())}

    before = loss()
    assert moving() == {n for n in named if "the-buffer" in n}

    class Holder:
        def values(self) -> dict[str, Tensor]:
            return {n: p.detach().clone() for n, p in named.items()}

        def rewrite(self, new: dict[str, Tensor]) -> None:
            with torch.no_grad():
                for name, value in new.items():
                    named[name].copy_(value)

    method.after_step(Holder(), {}, Clock(3, 100, 10))
    assert not method._switched, "five steps of a hundred"
    method.after_step(Holder(), {}, Clock(4, 100, 10))
    assert method._switched
    after = loss()
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    assert moving() == {n for n in named if "lowrank_A.task0" in n or "lowrank_B.task0" in n}
    state = method.state_dict()
    again: Any = Bench("cram").method
    again._name = stage.name
    again.load_state_dict(model, state)
    assert again._switched and again._groups == {"task0": 0}
    assert torch.equal(again._sums["task0"], method._sums["task0"])


def test_centroids_start_at_the_mean_of_the_task_s_images() -> None:
    bench = Bench("cram")
    model = bench.begin(story("cram").stages[0])
    method: Any = bench.method
    batch = bench.batch(items("task0"))
    method.prepare(model, Given([batch]), alone)
    queries = frozen_queries(model, method.inputs(batch), batch.inputs).image
    mean = queries[batch.presence[:, 0]].mean(0)
    for part in lowrank(model).layers():
        for layer in part:
            torch.testing.assert_close(
                layer.lowrank_H["task0"]["centroid"].weight[0], mean, rtol=0, atol=1e-6
            )


def test_the_penalty_is_what_a_slot_reads_of_the_group_s_earlier_ones() -> None:
    told = story("cram")
    bench = Bench("cram")
    stage = told.stages[1]
    model = bench.method.begin(bench.base(), stage)
    method: Any = bench.method
    method.prepare(model, Given([bench.batch(items("task1"))]), alone)
    values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    assert method.penalties(values, Clock(0, 100, 10)) == {}, "not before there is a slot"
    method._switched = True
    found = method.penalties(values, Clock(9, 100, 10))["decorrelation"]
    terms = []
    for part in lowrank(model).layers():
        for layer in part:
            old = layer.lowrank_A["task0"].weight.detach().double()
            kept = old[old.norm(dim=1) > 0]
            q = torch.linalg.qr(kept.T).Q
            terms.append((layer.lowrank_A["task1"].weight.detach().double() @ q).square().sum())
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    method._groups["task0"] = 3
    assert method.penalties(values, Clock(9, 100, 10)) == {}, "other groups may read the same"


def test_a_trained_slot_is_orthogonal_at_its_start_and_old_ones_stay() -> None:
    told = story("cram")
    first, second = told.trained
    kept = {n: t for n, t in second.model.named_parameters() if ".task0." in n}
    assert kept
    for name, tensor in kept.items():
        assert torch.equal(tensor, first.end[name]), "to the bit"


def test_a_group_and_its_prototype_are_kept(tmp_path: Path) -> None:
    told = story("cram")
    bench = Bench("cram")
    past = {t: Past(d.folder, s.tasks) for t, d, s in zip(TASKS, told.trained, told.stages, strict=True)}
    bench.method.begin(bench.base(), Stage(2, "task2", (), past))
    method: Any = bench.method
    assert method._groups == {"task0": 0, "task1": 0, "task2": 2}, "the new one's own, until `prepare`"
    assert method._sums.keys() == {"task0", "task1"} and method._sums["task0"][-1] == 8.0
    both = (method._sums["task0"] + method._sums["task1"])[:-1] / 16
    torch.testing.assert_close(method._prototypes(), both.unsqueeze(0))
