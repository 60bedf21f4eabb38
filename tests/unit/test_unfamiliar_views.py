"""A view far from all tasks says nothing of the task: another wording must not overrule the picture."""

import pytest
import torch

from delo_llava.features.queries import VIEWS, Queries
from delo_llava.features.task_keys import TaskKeyMemory

D, TASKS = 96, ["a", "b", "c"]


def drawn(task: int, rows: int, seed: int) -> Queries:
    """Queries around a task's centres; the spread differs by direction."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 3, D, generator=torch.Generator().manual_seed(1))[task]
    scale = torch.linspace(0.05, 1.0, D)
    return Queries(*(0.5 * centres[v] + scale * torch.randn(rows, D, generator=draw) for v in range(3)))


def known(unfamiliar: float, rows: int = 400) -> TaskKeyMemory:
    keys = TaskKeyMemory(D, unfamiliar=unfamiliar)
    for t, name in enumerate(TASKS):
        keys.observe(name, drawn(t, rows, 10 + t), torch.ones(rows, 2, dtype=torch.bool))
        keys.settle(name)
    return keys


def asked(rows: int = 60, task: int = 1) -> tuple[Queries, torch.Tensor]:
    return drawn(task, rows, 77), torch.ones(rows, 2, dtype=torch.bool)


def reworded(queries: Queries) -> Queries:
    """The same instruction for all rows, unlike any that was trained, yet nearer to task c than to b."""
    words = 6.0 * torch.randn(D, generator=torch.Generator().manual_seed(5))
    toward = drawn(2, 1, 3).instruction[0]
    return queries._replace(instruction=(words + 8 * toward).expand(len(queries.image), D))


def test_samples_of_the_trained_kind_are_chosen_to_the_bit_as_without() -> None:
    queries, presence = asked()
    on, off = (known(k).choose(queries, presence, TASKS, "lda") for k in (8.0, 0.0))
    assert torch.equal(on[1], off[1]) and torch.equal(on[0], off[0])


def test_a_foreign_instruction_is_not_listened_to() -> None:
    queries, presence = asked()
    foreign = reworded(queries)
    assert (known(0.0).choose(foreign, presence, TASKS, "lda")[0] != 1).any(), "else nothing is shown"
    index, scores = known(8.0).choose(foreign, presence, TASKS, "lda")
    rest = known(0.0).choose(foreign, presence, TASKS, "lda", VIEWS[:2])
    assert (index == 1).all()
    assert torch.equal(scores, rest[1])


def test_rows_are_judged_one_by_one() -> None:
    queries, presence = asked()
    foreign, keys = reworded(queries), known(8.0)
    mixed = queries._replace(instruction=torch.cat([queries.instruction[:30], foreign.instruction[30:]]))
    scores = keys.choose(mixed, presence, TASKS, "lda")[1]
    assert torch.equal(scores[:30], keys.choose(queries, presence, TASKS, "lda")[1][:30])
    assert torch.equal(scores[30:], keys.choose(foreign, presence, TASKS, "lda")[1][30:])


@pytest.mark.parametrize("absent", [[False, False], [True, False]])
def test_where_no_view_is_near_all_speak(absent: list[bool]) -> None:
    queries, presence = asked()
    far = Queries(*(view * 40 for view in reworded(queries)))
    presence = torch.tensor([absent]).expand(len(presence), 2)
    on, off = (known(k).choose(far, presence, TASKS, "lda") for k in (8.0, 0.0))
    assert torch.equal(on[1], off[1])


def test_the_distance_is_the_gaussian_one_in_units_of_a_training_sample() -> None:
    keys, view = known(8.0), 0
    queries, _ = asked(300)
    parts = [keys.tasks[t] for t in TASKS]
    means = torch.stack([part.means()[view] for part in parts])
    within = sum(part.scatter(view) for part in parts) / sum(part.count[view] for part in parts)
    covariance = 0.9 * within * 1200 / 1197
    covariance += 0.1 * (within * 1200 / 1197).diagonal().mean() * torch.eye(D, dtype=torch.float64)
    inverse = torch.linalg.inv(covariance)
    apart = queries[view].double().unsqueeze(1) - means
    inside = (inverse @ within).trace()
    exact = ((apart @ inverse) * apart).sum(2).amin(1) / (inside / (1 - inside / 1200))
    estimate = keys._solved(TASKS, view).distance(queries[view].double())
    assert (estimate / exact).mean() == pytest.approx(1.0, abs=0.1)
    assert (estimate / exact).std() < 0.25
    new = torch.cat([drawn(t, 400, 20 + t)[view].double() for t in range(3)])
    assert keys._solved(TASKS, view).distance(new).mean() == pytest.approx(1.0, abs=0.1)


def test_with_few_samples_nothing_is_unfamiliar() -> None:
    queries, presence = asked()
    foreign = reworded(queries)
    on, off = (known(k, rows=100).choose(foreign, presence, TASKS, "lda") for k in (8.0, 0.0))
    assert torch.equal(on[1], off[1])


def test_a_view_that_never_varied_does_not_make_everything_unfamiliar() -> None:
    keys = TaskKeyMemory(D, unfamiliar=8.0)
    words = torch.randn(3, D, generator=torch.Generator().manual_seed(9))
    for t, name in enumerate(TASKS):
        one = drawn(t, 200, 10 + t)._replace(instruction=words[t].expand(200, D))
        keys.observe(name, one, torch.ones(200, 2, dtype=torch.bool))
        keys.settle(name)
    queries, presence = asked(20)
    same = queries._replace(instruction=words[1].expand(20, D))
    assert (keys._solved(TASKS, 2).distance(same.instruction.double()) < 1).all()
    assert (keys.choose(same, presence, TASKS, "lda")[0] == 1).all()
