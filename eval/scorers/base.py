"""What a scorer is: an id with a version, and a number in [0, 1] for one prediction."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scorer:
    """Judges one prediction against its reference answer; a task's score is 100 × the mean over its records.

    Attributes:
        id: name and version; results are comparable only where ids are equal.
        rule: what counts as right, in one sentence.
        function: (prediction, answer) -> score in [0, 1].
    """

    id: str
    rule: str
    function: Callable[[str, str], float]

    def __call__(self, prediction: str, answer: str) -> float:
        """The score of `prediction` in [0, 1]."""
        return self.function(prediction, answer)
