"""What a stage trains on, as batches on one rank: which examples in which forward pass, collated one step
ahead."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch, Collator, Views
from delo_llava.data.examples import Examples, Item
from delo_llava.data.sampler import mixed_batches, step_batches
from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError
from delo_llava.methods.base import Clock, Method, Mixture
from delo_llava.training.loop import Ledger

#: What an image adds to a record's length, in characters of text: only the order of lengths matters.
IMAGE_CHARACTERS = 256


class StageBatches:
    """A stage's mixture cut into global batches.

    Args:
        seed: decides the order of examples; the same for every rank.
        lengths: of all examples in tokens (`training.lengths`); without them, characters and a constant for a
            picture.

    Attributes:
        examples: all parts, one after the other.
        steps: global batches, each a list of positions in `examples`.
        epoch_steps: steps in which the first part is seen once.
    """

    def __init__(
        self, config: RunConfig, mixture: Mixture, seed: int, lengths: Sequence[int] | None = None
    ) -> None:
        self.config = config
        self.examples = sum((part.examples for part in mixture[1:]), start=mixture[0].examples)
        self.presence = self.examples.presence
        lengths = self._characters() if lengths is None else lengths
        train, shares = config.train, [part.share for part in mixture]
        if all(share is None for share in shares):
            self.steps = step_batches(
                lengths, train.global_batch, seed, epochs=train.epochs, steps=train.max_steps,
                group_by_length=config.data.group_by_length,
            )  # fmt: skip
            self.epoch_steps = math.ceil(len(self.examples) / train.global_batch)
        else:
            sizes = _sizes(shares, train.global_batch)
            counts = [len(part.examples) for part in mixture]
            self.epoch_steps = math.ceil(counts[0] / sizes[0])
            steps = math.ceil(train.epochs * counts[0] / sizes[0])
            self.steps = mixed_batches(counts, sizes, min(steps, train.max_steps or steps), lengths, seed)

    def clock(self, step: int) -> Clock:
        """Where the stage stands at `step`."""
        return Clock(step, len(self.steps), self.epoch_steps)

    def mine(self, ranks: Ranks, collator: Collator, method: Method, start: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every global batch from step `start` on; a thread collates the next
        ones meanwhile.
        """
        micro = self.config.train.micro_batch

        def make(step: int) -> list[Batch]:
            indices = self.steps[step]
            share = deal(indices, self._images(indices), ranks.world, micro)[ranks.rank]
            clock = self.clock(step)
            return [
                _collated(collator, self._items(part), lambda items: method.views(items, clock))
                for part in share
            ]

        yield from ahead(iter(range(start, len(self.steps))), make)

    def _images(self, indices: Sequence[int]) -> list[bool]:
        """Whether each record is given to the vision tower."""
        if self.config.missing.image == "dummy":
            return [True] * len(indices)
        return [bool(self.presence[i, 0]) for i in indices]

    def _items(self, indices: Sequence[int]) -> list[Item]:
        return [self.examples[i] for i in indices]

    def _characters(self) -> list[int]:
        texts, contexts = self.examples.characters.T
        image, text = self.presence.T
        lengths: list[int] = (texts + contexts * text + IMAGE_CHARACTERS * image).tolist()
        return lengths


class StagePasses:
    """This rank's part of single passes over a stage's own examples (`methods.base.Passes`).

    Args:
        ledger: takes note of what is left out.
        seed: of the stage; decides which examples are drawn.
    """

    def __init__(
        self,
        examples: Examples,
        config: RunConfig,
        ranks: Ranks,
        collator: Callable[[], Collator],
        ledger: Ledger,
        seed: int,
    ) -> None:
        self._examples, self._config, self._ranks, self._collator = examples, config, ranks, collator
        self._ledger, self._seed = ledger, seed

    def all(self, size: int | None = None) -> Iterator[Batch]:
        """Every example once."""
        return self._pass(range(len(self._examples)), size)

    def drawn(self, count: int, size: int | None = None) -> Iterator[Batch]:
        """`count` examples, drawn evenly."""
        return self._pass(self._some(np.arange(len(self._examples)), count), size)

    def complete(self, count: int) -> Iterator[Batch]:
        """`count` of the examples that have both modalities, drawn evenly."""
        return self._pass(self._some(np.flatnonzero(self._examples.presence.all(1)), count), None)

    def _some(self, indices: NDArray[np.int64], count: int) -> list[int]:
        """`count` of the indices, in their order."""
        if count < len(indices):
            random = np.random.default_rng(self._seed)
            indices = np.sort(random.choice(indices, count, replace=False))
        return list(indices.tolist())

    def _pass(self, chosen: Sequence[int], size: int | None) -> Iterator[Batch]:
        mine, size = chosen[self._ranks.rank :: self._ranks.world], size or self._config.train.micro_batch
        collator = self._collator()
        parts = (list(mine[start : start + size]) for start in range(0, len(mine), size))
        for batch in ahead(parts, lambda indices: collator([self._examples[i] for i in indices])):
            self._ledger.cut.add(batch.cuts)
            self._ledger.bad_images |= dict(collator.bad_images)  # a copy: the thread adds to it
            if not batch.filler:
                yield batch.to(self._ranks.device)


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


def ahead(sources: Iterator[Any], make: Callable[[Any], Any]) -> Iterator[Any]:
    """`make(source)` for each source, in order, the next one being made while the caller works."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as pool:
        waiting = [pool.submit(make, source) for source in _first(sources, 1)]
        while waiting:
            ready = waiting.pop(0).result()
            waiting += [pool.submit(make, source) for source in _first(sources, 1)]
            yield ready


def _collated(collator: Collator, items: list[Item], views: Views) -> Batch:
    """A batch.

    Raises:
        DeloError: whatever went wrong, with the records.
    """
    try:
        return collator(items, views)
    except DeloError:
        raise
    except Exception as error:
        names = ", ".join(f"{record.task}/{record.id}" for record, _ in items)
        text = f"A batch cannot be made: {type(error).__name__}: {error}"
        raise DeloError(text, given=f"records {names}") from error


def _sizes(shares: Sequence[float | None], batch: int) -> list[int]:
    """How many examples of each part make up a global batch: the largest remainders are rounded up.

    Raises:
        DeloError: the shares are not all given, do not sum to one, or leave a part without any.
    """
    given = [share or 0.0 for share in shares]
    if None in shares or not math.isclose(sum(given), 1.0, abs_tol=1e-6):
        raise DeloError(
            "The shares of a mixture must be given for every part and sum to one", given=list(shares)
        )
    exact = [share * batch for share in given]
    sizes = [int(size) for size in exact]
    for place in sorted(range(len(exact)), key=lambda i: sizes[i] - exact[i])[: batch - sum(sizes)]:
        sizes[place] += 1
    if min(sizes) < 1:
        raise DeloError(
            "A part of a mixture has no place in the global batch",
            given=f"shares {list(shares)} of {batch}", fix="a larger train.global_batch",
        )  # fmt: skip
    return sizes


def _first(sources: Iterator[Any], count: int) -> list[Any]:
    return [source for _, source in zip(range(count), sources, strict=False)]
