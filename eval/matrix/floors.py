"""What a task's score is worth: what it is without looking at anything.

A score of 26 % on a choice of three is no result. Both floors are made of the questions that were scored, by
the task's own rule: always giving the most frequent of the reference answers, and drawing from a closed set.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from delo_eval.scorers.base import Reference, Scorer


@dataclass(frozen=True)
class Floor:
    """The scores of answering blindly, in percent.

    Attributes:
        scorer: id of the rule.
        records: questions that count.
        answer: the most frequent reference answer; of equally frequent ones the first.
        majority: the score of always giving it.
        chance: the expected score of drawing among a question's options; None without a closed set.
    """

    scorer: str
    records: int
    answer: str
    majority: float
    chance: float | None

    def to_json(self) -> dict[str, Any]:
        """What is stored of it."""
        return asdict(self)


def floor_of(scorer: Scorer, references: Iterable[Reference], answers: Sequence[str] = ()) -> Floor | None:
    """The floors of a task; None for rules that are too slow to be applied for it, and without questions.

    Args:
        answers: the closed set of answers that the task declares; without it a question's own `choices` or
            `classes` are one.
    """
    counted = [reference for reference in references if scorer.is_counted(reference)]
    if not counted or (scorer.corpus is not None and not scorer.resamples):
        return None
    said = Counter(scorer.right_answer(reference) for reference in counted)
    ((constant, _),) = said.most_common(1)
    majority = 100 * scorer.total([constant] * len(counted), counted)
    chance = _chance(scorer, counted, answers)
    return Floor(scorer.id, len(counted), constant, majority, chance)


def _chance(scorer: Scorer, references: Sequence[Reference], answers: Sequence[str]) -> float | None:
    """The mean over questions of that over their options; None where one has none or the rule is no mean."""
    if scorer.corpus is not None:
        return None
    total = 0.0
    for reference in references:
        options = answers or options_of(reference)
        if not options:
            return None
        total += sum(scorer(option, reference) for option in options) / len(options)
    return 100 * total / len(references)


def options_of(reference: Reference) -> list[str]:
    """The answers that a question allows, as its data says: letters or texts of `choices`, or `classes`."""
    choices = reference.extra.get("choices") or []
    if choices and reference.answer.strip() not in map(str, choices):
        return [chr(ord("A") + place) for place in range(len(choices))]
    return [str(option) for option in choices or reference.extra.get("classes") or []]
