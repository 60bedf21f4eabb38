"""A whole answer file scored: by the native rule and by the official script's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from delo_eval.answers.files import FileAnswers, Matched, match
from delo_eval.scorers.base import Reference, Scorer, Scoring
from delo_eval.scorers.mif import SCORER as MIF
from delo_eval.scorers.mif import obeys
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file


@dataclass(frozen=True)
class FileScore:
    """The score of an answer file by one rule.

    Attributes:
        mode: `native` or `compat`.
        scorer: the rule.
        score: in per cent (a caption metric may exceed 100).
        count: questions in the denominator.
        standard_error: of the mean over questions, in points; None for rules that are no such mean.
        details: further numbers of the rule, in per cent.
        records: score of each question in [0, 1], None where it is not counted.
    """

    mode: Scoring
    scorer: Scorer
    score: float
    count: int
    standard_error: float | None
    details: dict[str, float]
    records: list[float | None]

    def to_json(self) -> dict[str, Any]:
        """What is stored of it."""
        return {
            "scorer": self.scorer.id,
            "rule": self.scorer.rule,
            "score": self.score,
            "records": self.count,
            "standard_error": self.standard_error,
            "details": self.details,
            "unanswered": self.scorer.unanswered,
        }


@dataclass(frozen=True)
class Scored:
    """An answer file with its scores.

    Attributes:
        scores: by each rule that was asked for.
        refused: why the official rule has no outcome; empty when it has one or none was asked for.
        following: share of answers in the format asked for, see `instruction_following`.
    """

    answers: FileAnswers
    matched: Matched
    references: list[Reference]
    scores: list[FileScore]
    refused: str
    following: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """What is stored of it, with the files' hashes."""
        missing = self.matched.missing
        return {
            "answers": {file.name: sha256_file(file) for file in self.answers.files},
            "questions": len(self.references),
            "missing": {"count": len(missing), "ids": missing},
            "scores": {one.mode: one.to_json() for one in self.scores},
            "not_scored": self.refused or None,
            "instruction_following": self.following,
        }


def score_all(
    scorer: Scorer,
    only: Scoring | None,
    answers: FileAnswers,
    references: list[Reference],
    *,
    allow_missing: bool = False,
) -> Scored:
    """Score answers natively and, where there is an official script, as it does.

    Args:
        only: one rule; without it the official one may be impossible for these data, which is told.
        allow_missing: count questions without answer instead of refusing them.

    Raises:
        DeloError: answers that do not fit the questions, or data the rule cannot be applied to.
    """
    matched = match(answers, references, allow_missing=allow_missing)
    scores = [score(scorer.in_mode(only or "native"), only or "native", matched, references)]
    refused = ""
    if only is None and scorer.compat is not None:
        try:
            scores.append(score(scorer.compat, "compat", matched, references))
        except DeloError as error:
            refused = f"{scorer.compat.id}: {error.message}"
    following = instruction_following(matched, references)
    return Scored(answers, matched, references, scores, refused, following)


def score(scorer: Scorer, mode: Scoring, matched: Matched, references: Sequence[Reference]) -> FileScore:
    """Score the answers by `scorer`, in the way its mode treats order and missing answers.

    A rule by position pairs answers and questions in the order of their files. Questions without answer count
    0, or are left out where the official script never looks at them.

    Raises:
        DeloError: references that lack what the rule needs, or missing answers where the script fails.
    """
    scorer.check(references)
    texts: list[str | None] = list(matched.texts)
    if scorer.by_position:
        if matched.missing and scorer.unanswered == "wrong":
            raise DeloError(
                f"{scorer.id} pairs by position and its script fails on missing answers.",
                given=f"{len(matched.missing)} missing",
                fix="score with --scoring native",
            )
        texts = [*matched.in_order, *[None] * (len(references) - len(matched.in_order))]
    records = [
        scorer(text, reference) if text is not None else (0.0 if scorer.unanswered == "wrong" else None)
        for text, reference in zip(texts, references, strict=True)
    ]
    counted = [value for value in records if value is not None]
    if scorer.corpus is None:
        mean = sum(counted) / len(counted)
        return FileScore(mode, scorer, 100 * mean, len(counted), _standard_error(counted, mean), {}, records)
    said = [text or "" for text in texts]
    details = scorer.details(said, references) if scorer.details else {}
    percent = {name: 100 * value for name, value in details.items()}
    return FileScore(mode, scorer, 100 * scorer.total(said, references), len(records), None, percent, records)


def instruction_following(matched: Matched, references: Sequence[Reference]) -> dict[str, Any] | None:
    """Share of questions whose answer has the format asked for, among those that ask for a known one; None
    without any. A missing answer does not follow."""
    asked = [
        obeyed
        for text, reference in zip(matched.texts, references, strict=True)
        if (obeyed := obeys(text or "", reference)) is not None
    ]
    if not asked:
        return None
    return {"scorer": MIF.id, "score": 100 * sum(asked) / len(asked), "records": len(asked)}


def _standard_error(values: Sequence[float], mean: float) -> float | None:
    """Of the mean, in points; None for a single value."""
    if len(values) < 2:
        return None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return 100 * math.sqrt(variance / len(values))
