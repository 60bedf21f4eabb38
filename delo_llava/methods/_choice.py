"""The task that a method chose for every sample of a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TaskChoice:
    """Per-sample task choice among `tasks`: `index` int64 B (−1: no evidence), `scores` B×T (higher is
    likelier).

    Attributes:
        void: bool B, rows for which the method came to no choice where it should have: they are answered by
            nothing, which is wrong, and stay in every denominator. None: no row.
    """

    tasks: tuple[str, ...]
    index: Tensor
    scores: Tensor
    void: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The task of each sample; without evidence the first one, to which a tie would go too."""
        return [self.tasks[max(0, i)] for i in self.index.tolist()]

    @property
    def fallback(self) -> list[bool]:
        """Which samples gave no evidence, so that their task is no choice."""
        return [i < 0 for i in self.index.tolist()]

    @property
    def voided(self) -> list[bool]:
        """Which samples are answered by nothing."""
        return [False] * len(self.index) if self.void is None else self.void.tolist()
