"""Batches of a stage: deterministic, full, length-grouped; accumulation derived or refused."""

from collections import Counter

import numpy as np
import pytest

from delo_llava.data.sampler import plan_accumulation, step_batches
from delo_llava.errors import DeloError

LENGTHS = np.random.default_rng(0).integers(5, 200, size=1000).tolist()


def test_whole_epochs_see_every_record_equally_often() -> None:
    batches = step_batches(LENGTHS, 50, seed=0, epochs=3)
    assert len(batches) == 60
    assert all(len(batch) == 50 for batch in batches)
    assert set(Counter(i for batch in batches for i in batch).values()) == {3}


@pytest.mark.parametrize("group", [True, False])
def test_every_batch_is_full_when_the_epoch_is_not_a_multiple(group: bool) -> None:
    batches = step_batches(LENGTHS, 48, seed=0, epochs=1, group_by_length=group)
    assert len(batches) == 21
    assert all(len(batch) == 48 for batch in batches)
    counts = Counter(i for batch in batches for i in batch)
    assert set(counts) == set(range(1000)), "no record is left out"
    assert Counter(counts.values()) == {1: 1000 - 8, 2: 8}, "the rest comes from the next epoch"


def test_steps_and_epochs() -> None:
    assert len(step_batches(LENGTHS, 50, seed=0, steps=7)) == 7
    assert len(step_batches(LENGTHS, 50, seed=0, epochs=0.5)) == 10
    assert len(step_batches(LENGTHS, 50, seed=0, epochs=1, steps=7)) == 7
    assert len(step_batches(LENGTHS, 50, seed=0, epochs=1, steps=700)) == 20


def test_the_same_arguments_give_the_same_batches_and_seeds_differ() -> None:
    first = step_batches(LENGTHS, 32, seed=4, epochs=2)
    assert step_batches(LENGTHS, 32, seed=4, epochs=2) == first
    assert step_batches(LENGTHS, 32, seed=5, epochs=2) != first


def test_epochs_differ_in_order() -> None:
    batches = step_batches(LENGTHS, 50, seed=0, epochs=2, group_by_length=False)
    assert batches[:20] != batches[20:]


def test_golden_order_never_changes() -> None:
    """Resuming a run depends on it."""
    assert step_batches([3, 1, 2, 5, 4], 2, seed=7, steps=3) == [[0, 2], [4, 1], [3, 0]]


def padding(batches: list[list[int]]) -> float:
    lengths = [[LENGTHS[i] for i in batch] for batch in batches]
    return sum(max(row) * len(row) for row in lengths) / sum(map(sum, lengths))


def test_grouping_by_length_saves_padding() -> None:
    grouped = step_batches(LENGTHS, 8, seed=0, epochs=1)
    random = step_batches(LENGTHS, 8, seed=0, epochs=1, group_by_length=False)
    assert padding(grouped) < 1.10 < 1.5 < padding(random)
    assert all(LENGTHS[batch[0]] == max(LENGTHS[i] for i in batch) for batch in grouped)


def test_grouped_batches_are_not_in_order_of_length() -> None:
    means = [np.mean([LENGTHS[i] for i in batch]) for batch in step_batches(LENGTHS, 8, seed=0, epochs=1)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_fewer_records_than_a_batch() -> None:
    [batch] = step_batches([1, 2, 3], 8, seed=0, epochs=1)
    assert Counter(batch).keys() == {0, 1, 2}
    assert len(batch) == 8


@pytest.mark.parametrize("given", [{}, {"steps": 0}, {"epochs": 0.0}])
def test_no_steps_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(DeloError, match="at least one step"):
        step_batches(LENGTHS, 8, seed=0, **given)  # type: ignore[arg-type]


def test_no_records_are_refused() -> None:
    with pytest.raises(DeloError, match="no records"):
        step_batches([], 8, seed=0, epochs=1)


@pytest.mark.parametrize(
    ("sizes", "accumulation"), [((32, 16, 2), 1), ((128, 4, 8), 4), ((32, 1, 1), 32), ((6, 3, 2), 1)]
)
def test_accumulation_is_derived(sizes: tuple[int, int, int], accumulation: int) -> None:
    assert plan_accumulation(*sizes) == accumulation


@pytest.mark.parametrize(
    ("sizes", "fix"),
    [
        ((32, 12, 2), "train.micro_batch=8"),
        ((32, 64, 1), "train.micro_batch=32"),
        ((32, 16, 4), "train.micro_batch=8"),
        ((32, 16, 3), "train.global_batch=48"),
        ((2, 16, 3), "train.global_batch=48"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_a_fix_that_works(
    sizes: tuple[int, int, int], fix: str
) -> None:
    with pytest.raises(DeloError, match=fix) as caught:
        plan_accumulation(*sizes)
    key, value = str(caught.value.fix).removeprefix("--train.").split("=")
    mended = {"global_batch": sizes[0], "micro_batch": sizes[1], key: int(value)}
    assert plan_accumulation(**mended, world_size=sizes[2]) >= 1
