"""Task keys: exact running means over what is present, and the choice among trained tasks (5.4, 10; invariant
9; traps T5–T8)."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from delo_llava.errors import DeloError
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.features.task_keys import TaskKeyMemory

D = 6


def sample(rows: int, seed: int, centre: int = 0) -> tuple[Queries, torch.Tensor]:
    """Queries around a task's own directions, and presence flags; queries of missing views are junk that
    must not
    count."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, D, generator=torch.Generator().manual_seed(100 + centre))
    views = [F.normalize(centres[v] + 0.3 * torch.randn(rows, D, generator=draw), dim=1) for v in range(3)]
    presence = torch.ones(rows, 2, dtype=torch.bool)
    presence[::3, 0] = False
    presence[1::3, 1] = False
    return Queries(*views), presence


def memory(tasks: int = 3, rows: int = 40) -> TaskKeyMemory:
    keys = TaskKeyMemory(D)
    for t in range(tasks):
        keys.observe(f"t{t}", *sample(rows, t, t))
        keys.settle(f"t{t}")
    return keys


def test_keys_are_means_over_present_samples() -> None:
    queries, presence = sample(11, 0)
    keys = TaskKeyMemory(D)
    for part in torch.arange(11).split(4):  # in batches, as accumulation would
        keys.observe("t", queries.rows(part), presence[part])
    keys.settle("t")
    seen = [presence[:, 0], presence[:, 1], torch.ones(11, dtype=torch.bool)]
    for view in range(3):
        torch.testing.assert_close(
            keys.tasks["t"].means()[view], queries[view][seen[view]].double().mean(0), rtol=0, atol=1e-14
        )
    assert keys.tasks["t"].count.tolist() == [float(s.sum()) for s in seen]


def test_ranks_add_up_exactly_and_only_once() -> None:
    queries, presence = sample(12, 0)
    whole = TaskKeyMemory(D)
    whole.observe("t", queries, presence)
    whole.settle("t")
    ranks = [TaskKeyMemory(D) for _ in range(2)]
    for rank, part in zip(ranks, torch.arange(12).split(7), strict=True):
        rank.observe("t", queries.rows(part), presence[part])
    told: list[torch.Tensor] = []  # what the other rank gives to the reduction, in its order
    ranks[1].settle("t", lambda tensor: told.append(tensor.clone()) or tensor)
    ranks[0].settle("t", lambda tensor: tensor + told.pop(0))
    ranks[0].settle("t", lambda tensor: tensor)  # nothing pending any more
    for name, tensor in whole.tasks["t"].tensors().items():
        torch.testing.assert_close(ranks[0].tasks["t"].tensors()[name], tensor, rtol=0, atol=1e-13)


def test_a_task_without_samples_on_this_rank_still_settles() -> None:
    keys = TaskKeyMemory(D)
    seen = []
    keys.settle("t", lambda tensor: seen.append(tensor.shape) or tensor)
    assert len(seen) == 3 and keys.tasks["t"].count.sum() == 0


def test_cosine_is_the_mean_over_present_views() -> None:
    keys = memory()
    queries, presence = sample(9, 77, 1)
    index, scores = keys.choose(queries, presence, ["t0", "t1", "t2"])
    for i in range(9):
        present = [v for v in range(3) if v == 2 or presence[i, v]]
        for t in range(3):
            means = keys.tasks[f"t{t}"].means()
            expected = sum(
                F.cosine_similarity(queries[v][i].double(), means[v], dim=0) for v in present
            ) / len(present)
            assert scores[i, t].item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.equal(index, scores.argmax(1)) and (index == 1).float().mean() > 0.8


def test_lda_is_the_log_likelihood_under_one_covariance() -> None:
    """Up to a number of each sample, which is the same for all tasks."""
    keys = TaskKeyMemory(D, shrinkage=0.2)
    data = {f"t{t}": sample(30, t, t) for t in range(3)}
    for task, (queries, presence) in data.items():
        keys.observe(task, queries, presence)
        keys.settle(task)
    queries, presence = sample(7, 50, 2)
    _, scores = keys.choose(queries, presence, list(data), matcher="lda")
    expected = torch.zeros(7, 3, dtype=torch.float64)
    for v in range(3):
        groups = [q[v][p[:, v] if v < 2 else slice(None)].double() for q, p in data.values()]
        centred = torch.cat([g - g.mean(0) for g in groups])
        covariance = centred.T @ centred / (len(centred) - 3)
        covariance = 0.8 * covariance + 0.2 * covariance.diagonal().mean() * torch.eye(D, dtype=torch.float64)
        for i in range(7):
            if v == 2 or presence[i, v]:
                for t, group in enumerate(groups):
                    offset = queries[v][i].double() - group.mean(0)
                    expected[i, t] += -0.5 * offset @ torch.linalg.inv(covariance) @ offset
    scores, expected = (table - table.mean(1, keepdim=True) for table in (scores, expected))
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-9)


def naive(keys: TaskKeyMemory, queries: Queries, presence: torch.Tensor, tasks: list[str]) -> torch.Tensor:
    """Log-likelihoods B×T with nothing kept and nothing left out, by an inverse."""
    total = torch.zeros(len(presence), len(tasks), dtype=torch.float64)
    for view, query in enumerate(queries):
        statistics = [keys.tasks[task] for task in tasks]
        means = torch.stack([s.sums[view] / s.count[view] for s in statistics])
        within = [
            s.products[view] - s.count[view] * torch.outer(m, m)
            for s, m in zip(statistics, means, strict=True)
        ]
        covariance = sum(within) / (sum(s.count[view] for s in statistics) - len(tasks))
        spread = covariance.diagonal().mean() * torch.eye(keys.hidden, dtype=torch.float64)
        inverse = torch.linalg.inv((1 - keys.shrinkage) * covariance + keys.shrinkage * spread)
        for row, seen in enumerate(presence[:, view] if view < 2 else presence.new_ones(len(presence))):
            offsets = query[row].double() - means
            total[row] -= seen * 0.5 * ((offsets @ inverse) * offsets).sum(1)
    return total


def test_choices_are_those_of_a_naive_reference() -> None:
    """Many samples in a space of more directions than most tasks have samples; tasks that lie close."""
    draw = torch.Generator().manual_seed(4)
    keys, tasks, width = TaskKeyMemory(40), [f"t{i}" for i in range(5)], 40
    shared = torch.randn(width, width, generator=draw)

    def of(task: int, rows: int) -> tuple[Queries, torch.Tensor]:
        centres = 0.03 * torch.randn(3, width, generator=torch.Generator().manual_seed(task))
        views = [
            F.normalize(c + torch.randn(rows, width, generator=draw) @ shared / width, dim=1) for c in centres
        ]
        return Queries(*views), torch.rand(rows, 2, generator=draw) > 0.3

    for number, task in enumerate(tasks):
        keys.observe(task, *of(number, 300 if number == 2 else 25))
        keys.settle(task)
    wrong = 0
    for number in range(len(tasks)):
        queries, presence = of(number, 60)
        index, scores = keys.choose(queries, presence, tasks, "lda")
        expected = naive(keys, queries, presence, tasks)
        assert torch.equal(index, expected.argmax(1))
        wrong += int((index != number).sum())
        gap = scores - scores[:, :1] - (expected - expected[:, :1])
        assert gap.abs().max() <= 1e-9 * max(1.0, float(expected.abs().max()))
    assert wrong, "only clear cases would agree trivially"


def test_a_choice_keeps_its_factor_until_the_statistics_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three factors for any number of batches, and three new ones after each change."""
    made: list[int] = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: made.append(1) or cholesky(matrix))
    keys, tasks = memory(), ["t0", "t1", "t2"]
    queries, presence = sample(8, 9, 1)

    def chosen() -> torch.Tensor:
        made.clear()
        scores = [
            keys.choose(queries, presence, tasks, "lda", views)[1] for views in (VIEWS, VIEWS, VIEWS[:2])
        ]
        assert torch.equal(scores[0], scores[1])
        return scores[0]

    before = chosen()
    assert len(made) == 3 and torch.equal(chosen(), before) and not made
    keys.observe("t1", *sample(30, 77, 2))
    assert torch.equal(chosen(), before) and not made, "nothing counts before it is settled"
    keys.settle("t1")
    assert not torch.equal(chosen(), before) and len(made) == 3
    others = memory(rows=20)
    keys.load_state_dict(others.state_dict())
    assert torch.equal(chosen(), others.choose(queries, presence, tasks, "lda")[1])
    memory().save_task(tmp_path, "t0")
    keys.load({"t0": tmp_path})
    before = chosen()
    assert len(made) == 3
    fresh = TaskKeyMemory(D)
    fresh.load_state_dict(keys.state_dict())
    assert torch.equal(before, fresh.choose(queries, presence, tasks, "lda")[1])
    assert not torch.equal(keys.choose(queries, presence, ["t0", "t1"], "lda")[1], before[:, :2])


@pytest.mark.parametrize("matcher", ["cosine", "lda"])
def test_choice_is_per_sample_and_blind_to_missing_views(matcher: str) -> None:
    """Traps T5 and T7: neither the batch nor what fills a missing field has a vote."""
    keys, tasks = memory(), ["t0", "t1", "t2"]
    queries, presence = sample(12, 5, 0)
    index, scores = keys.choose(queries, presence, tasks, matcher)
    for i in range(12):
        alone = keys.choose(queries.rows(torch.tensor([i])), presence[[i]], tasks, matcher)
        torch.testing.assert_close(alone[1][0], scores[i], rtol=1e-9, atol=1e-9)
        assert alone[0][0] == index[i]
    junk = Queries(
        *(
            torch.where(presence[:, v : v + 1], q, torch.randn(12, D)) if v < 2 else q
            for v, q in enumerate(queries)
        )
    )
    torch.testing.assert_close(keys.choose(junk, presence, tasks, matcher)[1], scores)


@pytest.mark.parametrize("matcher", ["cosine", "lda"])
def test_without_evidence_no_task_is_chosen(matcher: str) -> None:
    """Not silently the first one."""
    queries, presence = sample(3, 2, 2)
    presence[:] = torch.tensor([[True, False], [False, True], [False, False]])
    index, scores = memory().choose(queries, presence, ["t0", "t1", "t2"], matcher, ["image"])  # type: ignore[arg-type]
    assert index.tolist() == [2, -1, -1] and not scores[1:].any()


@pytest.mark.parametrize("matcher", ["cosine", "lda"])
def test_only_trained_tasks_are_candidates(matcher: str) -> None:
    """Trap T8: no zero key can win, one task wins always, an unknown task is an error."""
    keys = memory(3)
    queries, presence = sample(10, 3, 2)
    opposite = Queries(*(-q for q in queries))
    assert keys.choose(opposite, presence, ["t1"], matcher)[0].tolist() == [0] * 10
    assert set(keys.choose(queries, presence, ["t0", "t1"], matcher)[0].tolist()) <= {0, 1}
    for arguments in ((["t9"],), ([],), (["t0"], "nearest"), (["t0"], "cosine", ["smell"])):
        with pytest.raises(DeloError):
            keys.choose(queries, presence, *arguments)


def test_views_can_be_left_out() -> None:
    keys, tasks = memory(), ["t0", "t1", "t2"]
    queries, presence = sample(8, 9, 1)
    _, without = keys.choose(queries, presence, tasks, views=("image", "text"))
    misled = queries._replace(instruction=torch.randn(8, D))
    assert torch.equal(keys.choose(misled, presence, tasks, views=("image", "text"))[1], without)
    assert not torch.equal(keys.choose(misled, presence, tasks)[1], without)


@pytest.mark.parametrize("matcher", ["cosine", "lda"])
def test_a_task_that_never_saw_a_view_is_neither_favoured_nor_punished(matcher: str) -> None:
    keys = memory(2)
    queries, presence = sample(30, 8, 2)
    keys.observe("t2", queries, presence & torch.tensor([True, False]))
    keys.settle("t2")
    test, _ = sample(10, 60, 2)
    only_text = torch.tensor([[False, True]]).expand(10, 2)
    _, scores = keys.choose(test, only_text, ["t0", "t1", "t2"], matcher, views=("text",))
    torch.testing.assert_close(scores[:, 2], scores[:, :2].mean(1))


def test_files_per_task(tmp_path: Path) -> None:
    keys = memory(2)
    for task in ("t0", "t1"):
        (tmp_path / task).mkdir()
        keys.save_task(tmp_path / task, task)
    before = (tmp_path / "t0" / TaskKeyMemory.FILE).read_bytes()
    again = TaskKeyMemory(D)
    again.load({t: tmp_path / t for t in ("t0", "t1")})
    queries, presence = sample(5, 4)
    found, exact = (m.choose(queries, presence, ["t0", "t1"], "lda") for m in (again, keys))
    assert torch.equal(found[0], exact[0])
    torch.testing.assert_close(found[1], exact[1], rtol=1e-4, atol=1e-3)  # moments have 16 bits in a file
    again.save_task(tmp_path / "t0", "t0")
    assert (tmp_path / "t0" / TaskKeyMemory.FILE).read_bytes() == before
    copy = TaskKeyMemory(D)
    copy.load_state_dict(keys.state_dict())
    assert torch.equal(copy.tasks["t1"].sums, keys.tasks["t1"].sums)
    again.observe("t0", *sample(30, 77, 0))  # what was loaded takes further samples
    again.settle("t0")
    keys.observe("t0", *sample(30, 77, 0))
    keys.settle("t0")
    torch.testing.assert_close(again.tasks["t0"].products, keys.tasks["t0"].products, rtol=0, atol=1e-2)
    with pytest.raises(DeloError, match="another base"):
        TaskKeyMemory(D + 1).load({"t0": tmp_path / "t0"})
    with pytest.raises(DeloError, match="are missing"):
        again.load({"t2": tmp_path})
    with pytest.raises(DeloError, match="No keys"):
        again.save_task(tmp_path, "t7")
    means_only = TaskKeyMemory(D, covariance=False)
    means_only.load({"t0": tmp_path / "t0"})
    with pytest.raises(DeloError, match="second moments"):
        means_only.choose(queries, presence, ["t0"], "lda")
