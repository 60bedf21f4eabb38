"""Which records make up every optimiser step: deterministic, and the same for any number of ranks."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from delo_llava.errors import DeloError

#: Records are sorted by length within windows of at most this many batches, so that batches stay random.
WINDOW = 50


def step_batches(
    lengths: Sequence[int],
    global_batch: int,
    seed: int,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    group_by_length: bool = True,
) -> list[list[int]]:
    """Record indices of every optimiser step.

    Records come in a fresh random order each epoch and every step is full: what is left of an epoch is joined
    with the beginning of the next. So after k whole epochs every record was seen k times, and the last step
    may hold records of the epoch that follows. Within a batch the longest record is first.

    Args:
        lengths: cost of each record, e.g. its tokens.
        global_batch: records per step over all ranks.
        seed: the order is a function of this, the lengths and the batch size only.
        epochs: passes over the data; with `steps` as well, the smaller number of steps counts.
        steps: optimiser steps.

    Raises:
        DeloError: no records, or neither epochs nor steps.
    """
    count = len(lengths)
    if count == 0:
        raise DeloError("There are no records to train on.")
    limits = [math.ceil(epochs * count / global_batch)] if epochs is not None else []
    limits += [steps] if steps is not None else []
    if not limits or (total := min(limits)) < 1:
        raise DeloError("Training needs at least one step.", given=f"epochs={epochs}, steps={steps}")
    stream = _stream(count, total * global_batch, seed)
    if not group_by_length:
        return [batch.tolist() for batch in stream.reshape(total, global_batch)]
    return _grouped(stream, np.asarray(lengths), global_batch, np.random.default_rng([seed, 1]))


def mixed_batches(
    counts: Sequence[int], sizes: Sequence[int], steps: int, lengths: Sequence[int], seed: int
) -> list[list[int]]:
    """Record indices of every optimiser step of a mixture: so many of each part, each part in an order of its
    own.

    Args:
        counts: records of each part, which lie one after the other.
        sizes: records of each part in a global batch.
        lengths: cost of each record; within a batch the longest is first.

    Raises:
        DeloError: a part without records.
    """
    if min(counts) < 1:
        raise DeloError("A part of a mixture has no records.", given=list(counts))
    starts = np.cumsum([0, *counts])[:-1]
    streams = [
        (_stream(count, steps * size, seed, part) + start).reshape(steps, size)
        for part, (count, size, start) in enumerate(zip(counts, sizes, starts, strict=True))
    ]
    known = np.asarray(lengths)
    joined = np.concatenate(streams, axis=1)
    return [row[np.argsort(-known[row], kind="stable")].tolist() for row in joined]


def plan_accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Forward passes per optimiser step and rank.

    Raises:
        DeloError: micro_batch × world_size does not divide the global batch.
    """
    accumulation, rest = divmod(global_batch, micro_batch * world_size)
    if accumulation and not rest:
        return accumulation
    per_rank, uneven = divmod(global_batch, world_size)
    fits = [] if uneven else [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    near = min(fits, key=lambda size: abs(size - micro_batch), default=None)
    raise DeloError(
        f"{world_size} ranks × micro-batch {micro_batch} do not divide the global batch {global_batch}.",
        given=f"train.global_batch={global_batch}, train.micro_batch={micro_batch}, {world_size} ranks",
        fix=f"--train.micro_batch={near}" if near else f"--train.global_batch={micro_batch * world_size}",
    )


def _stream(count: int, length: int, seed: int, part: int = 0) -> NDArray[np.int64]:
    """`length` indices: one permutation of all records after the other."""
    generator = np.random.default_rng([seed, 2, part] if part else [seed, 0])
    epochs = [generator.permutation(count) for _ in range(math.ceil(length / count))]
    return np.concatenate(epochs)[:length].astype(np.int64)


def _grouped(
    stream: NDArray[np.int64], lengths: NDArray[np.int64], batch: int, generator: np.random.Generator
) -> list[list[int]]:
    """Cut the stream into batches of similar length: records sorted within windows, then batches shuffled."""
    window = max(1, min(WINDOW, len(lengths) // (4 * batch))) * batch
    batches: list[list[int]] = []
    for start in range(0, len(stream), window):
        part = stream[start : start + window]
        ordered = part[np.argsort(-lengths[part], kind="stable")].reshape(-1, batch)
        batches += [ordered[row].tolist() for row in generator.permutation(len(ordered))]
    return batches
