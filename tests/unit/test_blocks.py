"""Statistics that are summed in blocks of rows: the same bits however the rows arrive and whenever a run is
left, and the same numbers as a plain sum."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from delo_llava.features.blocks import BLOCK, RowBlocks
from delo_llava.features.queries import Queries
from delo_llava.features.ridge import RidgeStatistics
from delo_llava.features.task_keys import TaskKeyMemory

D, ROWS = 24, 2 * BLOCK + 77
#: Where batches end: small ones, one that fills several blocks, one that ends with a block, an empty one.
CUTS = {
    "ones": list(range(ROWS + 1)),
    "fours": [*range(0, ROWS, 4), ROWS],
    "at once": [0, ROWS],
    "at a block": [0, BLOCK, BLOCK, BLOCK + 5, ROWS],
}


def samples(seed: int = 0) -> tuple[Queries, Tensor]:
    """Queries of ROWS samples, a third of them without an image, a third without text."""
    draw = torch.Generator().manual_seed(seed)
    presence = torch.ones(ROWS, 2, dtype=torch.bool)
    presence[::3, 0] = False
    presence[1::3, 1] = False
    return Queries(*(torch.randn(ROWS, D, generator=draw) for _ in range(3))), presence


def parts(cuts: list[int]) -> list[Tensor]:
    """Which rows each batch holds."""
    return [torch.arange(start, end) for start, end in pairwise(cuts)]


def keys_of(cuts: list[int], left_at: int | None = None) -> TaskKeyMemory:
    """The memory after all batches; left after batch `left_at`, and gone on with in a fresh one."""
    (queries, presence), memory = samples(), TaskKeyMemory(D)
    for number, rows in enumerate(parts(cuts)):
        if number == left_at:
            sums, waiting = memory.running("t")
            stored = [{name: tensor.clone() for name, tensor in part.items()} for part in (sums, waiting)]
            memory = TaskKeyMemory(D)
            memory.resume("t", *stored)
        memory.observe("t", queries.rows(rows), presence[rows])
    memory.settle("t")
    return memory


def test_blocks_are_cut_by_rows_alone() -> None:
    rows = torch.randn(ROWS, D)
    taken: list[Tensor] = []
    blocks = RowBlocks(D, taken.append)
    for part in parts(CUTS["fours"]):
        blocks.add(rows[part])
    assert [len(block) for block in taken] == [BLOCK, BLOCK] and torch.equal(blocks.rows(), rows[2 * BLOCK :])
    blocks.flush()
    blocks.flush()
    assert len(taken) == 3 and torch.equal(torch.cat(taken), rows.double()) and not len(blocks.rows())


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_moments_do_not_depend_on_the_batches(cuts: list[int]) -> None:
    found, expected = keys_of(cuts).tasks["t"], keys_of(CUTS["at once"]).tasks["t"]
    assert torch.equal(found.products, expected.products) and torch.equal(found.count, expected.count)
    torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-12)


def test_moments_are_those_of_a_plain_sum() -> None:
    queries, presence = samples()
    seen = (presence[:, 0], presence[:, 1], torch.ones(ROWS, dtype=torch.bool))
    found = keys_of(CUTS["fours"]).tasks["t"].products
    assert found is not None
    for view, (query, rows) in enumerate(zip(queries, seen, strict=True)):
        plain = sum(torch.outer(q, q) for q in query[rows].double())
        torch.testing.assert_close(found[view], plain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("left_at", [0, 1, BLOCK // 4, BLOCK // 4 + 1, 2 * BLOCK // 4 + 3])
def test_a_memory_that_was_left_goes_on_to_the_same_bits(left_at: int) -> None:
    found, expected = (keys_of(CUTS["fours"], left).tasks["t"].tensors() for left in (left_at, None))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rows_of_two_ranks_are_joined_when_one_goes_on() -> None:
    (queries, presence), halves = samples(), parts([0, ROWS // 2 + 9, ROWS])
    ranks = [TaskKeyMemory(D) for _ in halves]
    for rank, rows in zip(ranks, halves, strict=True):
        rank.observe("t", queries.rows(rows), presence[rows])
    (sums, rows), (more, others) = (rank.running("t") for rank in ranks)
    alone = TaskKeyMemory(D)
    alone.resume(
        "t", {n: sums[n] + more[n] for n in sums}, {n: torch.cat([rows[n], others[n]]) for n in rows}
    )
    alone.settle("t")
    for name, tensor in keys_of(CUTS["at once"]).tasks["t"].tensors().items():
        torch.testing.assert_close(alone.tasks["t"].tensors()[name], tensor, rtol=0, atol=1e-11)


def test_a_checkpoint_without_rows_is_taken() -> None:
    """Those of versions that summed every batch at once."""
    whole = keys_of(CUTS["at once"]).tasks["t"]
    memory = TaskKeyMemory(D)
    memory.resume("t", whole.tensors(), {})
    memory.settle("t")
    assert torch.equal(memory.tasks["t"].products, whole.products)  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_ridge_sums_do_not_depend_on_the_batches(cuts: list[int]) -> None:
    (queries, presence), statistics = samples(), RidgeStatistics.empty(D)
    for rows in parts(cuts):
        statistics.observe(queries.rows(rows), presence[rows])
    complete = presence.all(1)
    image, text = (query[complete].double() for query in (queries.image, queries.text))
    found = statistics.tensors()
    assert int(found["count"]) == len(image)
    plain = torch.stack([image.T @ image, text.T @ text, image.T @ text])
    torch.testing.assert_close(found["products"], plain, rtol=0, atol=1e-11)
    torch.testing.assert_close(found["sums"], torch.stack([image.sum(0), text.sum(0)]), rtol=0, atol=1e-12)
