"""One task's batches on one rank: which records in which forward pass, collated one step ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch, Collator
from delo_llava.data.missing import Presence, effective, record_presence
from delo_llava.data.readers import read_records
from delo_llava.data.sampler import step_batches
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, TaskSpec

#: What an image adds to a record's length, in characters of text: only the order of lengths matters.
IMAGE_CHARACTERS = 256


class TaskBatches:
    """Records of one task's training split under the run's missing pattern, cut into global batches.

    Args:
        seed: decides the order of records; the same for every rank.

    Attributes:
        steps: global batches, each a list of record indices.
        effective: counts and ratios of what is missing.
    """

    def __init__(self, config: RunConfig, task: TaskSpec, seed: int) -> None:
        self.config, self.task = config, task
        self.records = read_records(task, "train", config.data.sub, config.seed)
        self.presence: Presence = record_presence(config.missing, self.records)
        self.effective = effective(config.missing, self.records)
        self.steps = step_batches(
            self._lengths(),
            config.train.global_batch,
            seed,
            epochs=config.train.epochs,
            steps=config.train.max_steps,
            group_by_length=config.data.group_by_length,
        )

    def mine(self, rank: int, world: int, collator: Collator, start: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every global batch from step `start` on; a thread collates the next
        ones meanwhile.
        """
        micro = self.config.train.micro_batch
        shares = (deal(step, self._images(step), world, micro)[rank] for step in self.steps[start:])
        yield from _ahead(shares, lambda share: [collator(self._items(indices)) for indices in share])

    def shard(
        self, rank: int, world: int, collator: Collator, complete: int | None = None
    ) -> Iterator[Batch]:
        """This rank's part of one pass over the task, in micro-batches.

        Args:
            complete: pass over the first so many records that have both modalities, instead of all; which
                ones they are does not depend on the number of ranks.
        """
        chosen = (
            range(len(self.records))
            if complete is None
            else np.flatnonzero(self.presence.all(1))[:complete].tolist()
        )
        mine = chosen[rank::world]
        size = self.config.train.micro_batch
        parts = (list(mine[start : start + size]) for start in range(0, len(mine), size))
        batches = _ahead(parts, lambda indices: collator(self._items(indices)))
        yield from (batch for batch in batches if not batch.filler)

    def require_matching_ranks(self, world: int) -> None:
        """Check for ZeRO-3 that in every forward pass either all ranks have an image or none has.

        Its ranks gather parameters layer by layer, together; a rank that skips the vision tower would leave
        the others waiting.

        Raises:
            DeloError: some pass has images on some ranks only.
        """
        for number, step in enumerate(self.steps):
            shares = deal(step, self._images(step), world, self.config.train.micro_batch)
            for passes in zip(*shares, strict=True):
                if len({any(self._images(indices)) for indices in passes}) > 1:
                    raise DeloError(
                        f"ZeRO-3 cannot run step {number} of {self.task.name}: only some ranks get an image",
                        given=f"{sum(self._images(step))} images on {world} ranks",
                        fix="use --zero 2, a larger train.global_batch, or --missing.image dummy",
                    )

    def _images(self, indices: Sequence[int]) -> list[bool]:
        """Whether each record is given to the vision tower."""
        if self.config.missing.image == "dummy":
            return [True] * len(indices)
        return [bool(self.presence[i, 0]) for i in indices]

    def _items(self, indices: Sequence[int]) -> list[tuple[Record, tuple[bool, bool]]]:
        return [(self.records[i], (bool(self.presence[i, 0]), bool(self.presence[i, 1]))) for i in indices]

    def _lengths(self) -> list[int]:
        texts, contexts = self.records.characters.T
        image, text = self.presence.T
        lengths: list[int] = (texts + contexts * text + IMAGE_CHARACTERS * image).tolist()
        return lengths


def deal(step: Sequence[int], images: Sequence[bool], world: int, micro: int) -> list[list[list[int]]]:
    """A global batch shared out: [rank][pass] -> record indices.

    Records with an image come first and go round the ranks, so every rank gets about as many images as any
    other and forward passes with the same number agree, wherever possible, on whether there is an image at
    all.

    Args:
        step: record indices, a multiple of world × micro.
        images: whether each record has an image.
    """
    with_image = [i for i, has in zip(step, images, strict=True) if has]
    without = [i for i, has in zip(step, images, strict=True) if not has]
    size = world * micro
    over = len(with_image) % size
    if 0 < over < world < len(with_image):
        # Fewer images are left for the last pass with any than there are ranks: take some from the full pass
        # before it.
        cut, lent = len(with_image) - world, world - over
        ordered = [*with_image[:cut], *without[:lent], *with_image[cut:], *without[lent:]]
    else:
        ordered = [*with_image, *without]
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [[group[rank::world] for group in groups] for rank in range(world)]


def _ahead(sources: Iterator[Any], make: Any) -> Iterator[Any]:
    """`make(source)` for each source, in order, the next one being made while the caller works."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as pool:
        waiting = [pool.submit(make, source) for source in _first(sources, 1)]
        while waiting:
            ready = waiting.pop(0).result()
            waiting += [pool.submit(make, source) for source in _first(sources, 1)]
            yield ready


def _first(sources: Iterator[Any], count: int) -> list[Any]:
    return [source for _, source in zip(range(count), sources, strict=False)]
