"""PCLR: choice of ranks and tasks against plain loops, compression, who is trained and who stays."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, Story, items, story
from method_support import Given, alone
from torch import Tensor

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.engines.single import SingleTrained
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods._answers import at_answers
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods.base import Clock, Stage
from delo_llava.methods.pclr.memory import Pool
from delo_llava.methods.pclr.method import TEACHER
from delo_llava.methods.pclr.pool import (
    chosen,
    distil_sum,
    drawn_task,
    dropped,
    scores,
    student_keys,
    unit,
)

F64 = torch.float64
WIDTH = 12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def vectors(count: int) -> Tensor:
    return unit(torch.randn(count, 2, WIDTH, dtype=F64))


def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def pair(layer: LowRankLayer, name: str = ADAPTER) -> tuple[Tensor, Tensor]:
    """A and B of an adapter, float64."""
    a, b = (getattr(layer, f"lowrank_{part}")[name].weight.detach().double() for part in "AB")
    return a, b


# ---- the pool
def test_scores_and_choices_are_those_of_a_loop() -> None:
    queries, keys = vectors(5), vectors(9)
    found = scores(queries, keys, 0.25)
    for b in range(5):
        own = [float(q[0] @ k[0] + 0.25 * q[1] @ k[1]) for q in queries[b : b + 1] for k in keys]
        assert found[b].tolist() == pytest.approx(own, abs=1e-8)
        best = sorted(range(9), key=lambda i: -own[i])[:4]
        assert chosen(found, 4)[b].nonzero().flatten().tolist() == sorted(best)
    assert bool(chosen(found, 99).all()) and not bool(chosen(found, 0).any())


def test_without_an_image_the_words_alone_decide() -> None:
    queries, keys = vectors(3), vectors(9)
    queries[:, 1] = 0
    assert torch.allclose(scores(queries, keys, 0.25), queries[:, 0] @ keys[:, 0].T, atol=1e-8)


def test_ranks_of_one_key_are_taken_in_their_order_in_any_company() -> None:
    """Products of other shapes differ by rounding, which must not choose."""
    keys = vectors(3).repeat_interleave(30, 0)
    queries = vectors(64)
    together = chosen(scores(queries, keys, 0.25), 40)
    for row in range(64):
        assert torch.equal(chosen(scores(queries[row : row + 1], keys, 0.25), 40)[0], together[row])
        assert sorted(together[row].view(3, 30).sum(1).tolist()) == [0, 10, 30]
        partial = together[row].view(3, 30)[together[row].view(3, 30).sum(1) == 10][0]
        assert partial.nonzero().flatten().tolist() == list(range(10))


def test_every_skip_th_rank_is_dropped() -> None:
    assert dropped(256, 64).nonzero().flatten().tolist() == list(range(3, 256, 4))
    assert dropped(256, 32).nonzero().flatten().tolist() == list(range(7, 256, 8))
    assert not bool(dropped(8, 0).any()) and dropped(0, 0).shape == (0,)
    for ranks, count in ((10, 3), (7, 7), (9, 1)):
        assert int(dropped(ranks, count).sum()) == count


def test_those_who_stay_answer_to_the_tasks_they_stand_for() -> None:
    keys, queries = vectors(8), vectors(2)
    found = student_keys(keys, queries, 3, 0.25)
    for i in range(8):
        total = keys[i].clone()
        for query in queries:
            fit = scores(query.unsqueeze(0), keys, 0.25)[0]
            if i in fit.argsort(descending=True)[:3].tolist():
                total += query
        assert torch.allclose(found[i], total / total.norm(dim=-1, keepdim=True))
    fit = scores(queries, found, 0.25)
    assert torch.equal(chosen(fit, 3), chosen(scores(queries, keys, 0.25), 3)), "they are found still"


def test_tasks_are_drawn_by_the_root_of_their_loss() -> None:
    losses = torch.tensor([0.04, 0.64, 0.16])
    drawn = Counter(drawn_task(losses, seed) for seed in range(3000))
    for task, share in enumerate((0.2, 0.8, 0.4)):
        assert drawn[task] / 3000 == pytest.approx(share / 1.4, abs=0.04)
    assert drawn_task(losses, 5) == drawn_task(losses, 5)


def test_distillation_is_over_answers_and_the_teacher_s_largest_logits() -> None:
    teacher, student = torch.randn(2, 5, 30), torch.randn(2, 5, 30)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, -100, -100, 2]])
    total = 0.0
    for b, place in ((0, 2), (0, 3), (1, 1), (1, 4)):
        best = teacher[b, place - 1].double().argsort(descending=True)[:6]
        p = teacher[b, place - 1].double().softmax(0)[best].sqrt()
        q = student[b, place - 1].double().softmax(0)[best].sqrt()
        p, q = p / p.sum(), q / q.sum()
        total += float((p * (p / q).log()).sum())
    told, said = (at_answers(logits, labels) for logits in (teacher, student))
    assert float(distil_sum(told, said, 6)) == pytest.approx(total, rel=1e-5)
    assert float(distil_sum(told, told, 99)) == pytest.approx(0.0, abs=1e-6)


# ---- the method
def tale(folder: Path, **options: Any) -> Story:
    """Both tasks with other options than the contract's."""
    told = Story(Bench("pclr", "llava", "none", "--train.epochs=2", **options))
    for stage in told.bench.stages():
        stage = replace(stage, past=told.past(stage.index))
        told.stages.append(stage)
        told.trained.append(told.bench.train(stage, folder / stage.name))
    return told


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A pool with room for both tasks."""
    return tale(tmp_path_factory.mktemp("roomy"), pool=4.0)


def test_every_linear_adds_the_chosen_ranks() -> None:
    """Rows of different tasks and views, in float64, with shared ranks at their own scale."""
    told = story("pclr")
    model = told.bench.loaded(told.past(2))
    method: Any = told.bench.method
    pool: Pool = method._pool
    assert (pool.rank, pool.new, pool.shared, len(pool.keys)) == (4, 4, 2, 6)
    rows = [*items("task0")[:2], *items("task1")[:2]]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.name, (args[0], out)))
        for layer in layers(model)
    ]
    told.bench.logits(model, rows)
    for hook in hooks:
        hook.remove()
    batch = told.bench.batch(rows)
    queries = method_queries(method, model, batch)
    for layer in layers(model):
        x, y = seen[layer.name]
        a, b = pair(layer)
        owners = batch.image_rows.tolist() if layer.projector else range(len(x))
        for i, owner in enumerate(owners):
            fit = scores(queries[owner : owner + 1], pool.keys, 0.25)[0].tolist()
            among = range(6) if owner >= 2 else range(2)
            best = sorted(among, key=lambda k: -fit[k])[:4]
            delta = sum(2.0 * (x[i].double() @ a[2 + k]).unsqueeze(-1) * b[:, 2 + k] for k in best)
            delta = delta + 2.0 * 2.0 * (x[i].double() @ a[:2].T) @ b[:, :2].T
            expected = layer.base_layer(x[i]).double() + delta
            assert torch.allclose(y[i].double(), expected, atol=1e-5), layer.name


def method_queries(method: Any, model: Any, batch: Any) -> Tensor:
    """Words (context and instruction together, token by token) and image of every row."""
    embed = model.get_input_embeddings()
    found = frozen_queries(model, RouteInputs.from_batch(batch), batch.inputs)
    words = []
    for ids, segments in zip(batch.inputs["input_ids"], batch.segments, strict=True):
        words.append(embed(ids[segments >= 2]).double().mean(0))
    return unit(torch.stack([torch.stack(words), found.image.double()], 1))


def test_a_task_is_known_by_the_mean_of_its_queries(roomy: Story) -> None:
    model = roomy.bench.loaded(roomy.past(2))
    method: Any = roomy.bench.method
    assert method._pool.tasks == ("task0", "task1") and len(method._pool.keys) == 8
    batch = roomy.bench.batch([*items("task1"), *items("task1")])  # the eight training records' patterns
    probe = Bench("pclr", pool=4.0)
    start = probe.begin(Stage(0, "task1"))
    probe.method.prepare(start, Given([batch]), alone)
    expected = unit(method_queries(method, model, batch).sum(0))
    assert torch.allclose(probe.method._key, expected, atol=1e-6)  # type: ignore[attr-defined]
    assert torch.equal(method._pool.keys[4:], method._pool.queries[1].expand(4, -1, -1))
    choice = method.choose(model, roomy.bench.batch(items("task0")))
    own = scores(method_queries(method, model, roomy.bench.batch(items("task0"))), method._pool.queries, 0.25)
    assert torch.allclose(choice.scores, own, atol=1e-6) and torch.equal(choice.index, own.argmax(1))


def test_with_room_older_ranks_keep_their_bits_and_the_new_start_from_them(roomy: Story) -> None:
    first, second = (told.end for told in roomy.trained)
    for name, value in first.items():
        dim = 0 if "lowrank_A" in name else 1
        later = second[name].narrow(dim, 2, 4)  # behind two shared ranks
        assert torch.equal(later, value), name
        moved = second[name].narrow(dim, 6, 4)
        assert not torch.equal(moved, value) and float((moved - value).norm() / value.norm()) < 1, name


def test_older_tasks_answer_with_older_ranks_only(tmp_path: Path) -> None:
    """So with room, and no shared ranks, an earlier task's answers are what they were."""
    told, found = tale(tmp_path, pool=4.0, shared_from=9), []
    for count in (1, 2):
        model = told.bench.loaded(told.past(count))
        found.append(told.bench.logits(model, items("task0")))
    assert torch.allclose(*found, atol=1e-6)
    as_older = [(replace(record, task="task0"), presence) for record, presence in items("task1")]
    newest = told.bench.logits(model, items("task1"))
    assert not torch.allclose(told.bench.logits(model, as_older), newest, atol=1e-3), "negative control"


def compressing(**options: Any) -> tuple[Bench, Any, Story]:
    """The second stage of the contract's story, whose pool is full, at its start."""
    told = story("pclr")
    bench = Bench("pclr", **options)
    stage = Stage(1, "task1", told.stages[1].tasks, told.past(1), seed=3)
    model = bench.begin(stage)
    bench.method.prepare(model, Given([bench.batch(items("task1"))]), alone)
    return bench, model, told


def test_compression_keeps_every_other_rank_and_the_teacher_keeps_all() -> None:
    bench, model, told = compressing()
    assert bench.method._compressing  # type: ignore[attr-defined]
    for layer in layers(model):
        old_a, old_b = (
            told.trained[0].end[f"base_model.model.{layer.name}.lowrank_{part}.default.weight"].double()
            for part in "AB"
        )
        a, b = pair(layer)
        assert a.shape[0] == 2 + 2 + 4, "shared, kept, new"
        assert torch.equal(a[2:4], old_a[[0, 2]]) and torch.equal(b[:, 2:4], old_b[:, [0, 2]])
        whole_a, whole_b = pair(layer, TEACHER)
        assert torch.equal(whole_a, old_a) and torch.equal(whole_b, old_b)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(TEACHER in name for name in trained)


def test_phases_train_their_own_ranks() -> None:
    bench, model, _ = compressing(compress=0.5)
    method: Any = bench.method
    clocks = Clock(4, 10, 10), Clock(5, 10, 10)
    assert [method.weights(clock) for clock in clocks] == [
        {"answer": 0.0, "distil": 1.0},
        {"answer": 1.0, "distil": 0.0},
    ]
    assert [method._free(clock).int().tolist() for clock in clocks] == [
        [0, 0, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 1, 1],
    ]
    batch = bench.batch(items("task1"))
    for clock, term in zip(clocks, ("distil", "answer"), strict=True):
        method.weights(clock)
        model.zero_grad()
        sums = method.loss_sums(model, batch)
        assert list(sums) == [term] and sums[term].item() > 0
        sums[term].backward()
        touched = torch.zeros(8, dtype=torch.bool)
        for layer in layers(model):
            gradient: Any = layer.lowrank_B[ADAPTER].weight.grad  # type: ignore[union-attr]
            touched |= gradient.abs().sum(0) > 0
        assert bool(touched[2:4].all() if term == "distil" else touched[4:].all())
        assert term == "answer" or not bool(touched[4:].any()), "new ranks do not imitate"


def test_a_student_that_lost_nothing_is_the_teacher() -> None:
    bench, model, _ = compressing()
    method: Any = bench.method
    method._pool = replace(method._pool, keys=method._keys)
    for layer in layers(model):  # the teacher is what the student kept
        for part, dim in (("A", 0), ("B", 1)):
            weights: Any = getattr(layer, f"lowrank_{part}")
            kept = weights[ADAPTER].weight.data.narrow(dim, 2, 2)
            weights[TEACHER].weight.data = kept.clone()
    batch = bench.batch(items("task1"))
    with torch.no_grad():
        two = [method._logits(model, batch, method._as_task(0, teacher)) for teacher in (False, True)]
    assert float(distil_sum(*two, 100)) == pytest.approx(0.0, abs=1e-4)


def test_all_rows_imitate_one_task_whatever_they_show() -> None:
    bench, _, _ = compressing()
    method: Any = bench.method
    name, found = method._as_task(0, teacher=True)(vectors(3), None)
    assert name == TEACHER and bool((found == found[0]).all())


def test_the_schedule_of_a_full_pool() -> None:
    """256 of R = 64: 64 dropped and 64 new the first time, 32 and 32 from then on."""
    method: Any = Bench("pclr", rank=64, pool=4.0).method
    method._rank = 64
    told = []
    pool = Pool.empty(WIDTH)
    for _ in range(7):
        method._pool = pool
        out = method._make_room()
        told.append((int(out.sum()), method._new))
        keys = torch.zeros(len(pool.keys) - told[-1][0] + method._new, 2, WIDTH)
        pool = replace(pool, keys=keys, compressed=pool.compressed or told[-1][0] > 0)
    assert told == [(0, 64)] * 4 + [(64, 64), (32, 32), (32, 32)]


def test_a_resumed_stage_draws_and_starts_alike() -> None:
    bench, model, _ = compressing()
    method: Any = bench.method
    method._losses[0], method._started = 0.25, True
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    other, again, _ = compressing()
    other.method._key, other.method._losses = torch.zeros(2, 1), torch.zeros(0)  # type: ignore[attr-defined]
    other.method.load_state_dict(again, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.method.state_dict().items())


def test_no_evidence_chooses_nothing() -> None:
    told = story("pclr")
    model = told.bench.loaded(told.past(2))
    batch = told.bench.batch([items("task0")[1]])  # an image without context
    choice: Any = told.bench.method.choose(model, batch, ("text",))
    assert choice.index.tolist() == [-1] and math.isfinite(float(choice.scores[0, 0]))
    assert told.bench.method.choose(model, batch, ("text", "image")).index.tolist() != [-1]  # type: ignore[union-attr]


def test_files_of_a_stage_come_back(tmp_path: Path) -> None:
    pool = Pool(vectors(3), vectors(2), ("one", "two"), 4, 1, 2, True)
    pool.save(tmp_path)
    found = Pool.load(tmp_path)
    assert torch.equal(found.keys, pool.keys) and torch.equal(found.queries, pool.queries)
    nothing = torch.zeros(0)
    assert replace(found, keys=nothing, queries=nothing) == replace(pool, keys=nothing, queries=nothing)


def test_a_step_that_was_left_out_leaves_the_losses() -> None:
    bench, _, _ = compressing()
    method: Any = bench.method
    before, clock = method._losses.clone(), Clock(0, 8, 8)
    method._seen = torch.tensor([6.0, 4.0], dtype=torch.float64)
    method.before_step(SingleTrained({}, None), clock)  # type: ignore[arg-type]
    assert not torch.equal(method._losses, before)
    method.left_out(clock)
    assert torch.equal(method._losses, before)
