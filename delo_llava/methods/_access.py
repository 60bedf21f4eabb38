"""What a method is handed of a stage: single passes over its examples, and its trained parameters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from delo_llava.data.collate import Batch

#: Sums a tensor over all ranks and returns the sum (the identity in one process).
Reduce = Callable[[Tensor], Tensor]


class Passes(Protocol):
    """This rank's part of single passes over a stage's own examples, in their order, collated on demand."""

    def all(self, size: int | None = None) -> Iterator[Batch]:
        """Every example once, `size` to a batch (None: the micro-batch)."""

    def drawn(self, count: int, size: int | None = None) -> Iterator[Batch]:
        """`count` examples, all where there are no more, drawn evenly by the stage's seed: a file may be
        sorted. Which ones they are does not depend on the number of ranks.
        """

    def complete(self, count: int) -> Iterator[Batch]:
        """`count` of the examples that have both modalities, drawn likewise."""


class Trained(Protocol):
    """The trained parameters: whole, named, fp32, and bit-equal on every rank under every engine.

    Every rank must make the same calls, between the last backward pass of a global batch and its update
    (gradients) or between two updates (all others).
    """

    def values(self) -> dict[str, Tensor]:
        """A copy of every parameter."""

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of the global batch's loss, summed over ranks and accumulation, before clipping."""

    def add_gradients(self, extra: Mapping[str, Tensor]) -> None:
        """Add to gradients; the update and its norm see the sum."""

    def rewrite(self, new: Mapping[str, Tensor]) -> None:
        """Replace whole parameters, bit-equal on every rank, down to the engine's master copies."""

    def reset_moments(self, where: Mapping[str, Tensor]) -> None:
        """Forget the optimiser's moments where a mask of the parameter's shape is true."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over ranks: for what each rank saw of a step beside its gradient."""
