"""A whole answer file scored: by the native rule and by the official script's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from delo_eval.answers.matching import Matched
from delo_eval.matrix.floors import Floor, floor_of
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
        floor: what blind answers score; None for rules that are too slow for it.
    """

    mode: Scoring
    scorer: Scorer
    score: float
    count: int
    standard_error: float | None
    details: dict[str, float]
    records: list[float | None]
    floor: Floor | None

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
            "floor": None if self.floor is None else self.floor.to_json(),
        }


@dataclass(frozen=True)
class Scored:
    """An answer file with its scores.

    Attributes:
        scores: by each rule that was asked for.
        refused: why the official rule has no outcome; empty when it has one or none was asked for.
        following: share of answers in the format asked for, see `instruction_following`.
        notes: what a reader of the numbers should know, a sentence each.
    """

    matched: Matched
    scores: list[FileScore]
    refused: str
    following: dict[str, Any] | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """What is stored of it, with the files' hashes."""
        missing, answers = self.matched.missing, self.matched.answers
        return {
            "answers": {file.name: sha256_file(file) for file in answers.files},
            "keys": [{"id": columns.id, "answer": columns.text} for columns in answers.columns],
            "questions": len(self.matched.references),
            "missing": {"count": len(missing), "ids": missing},
            "repeated": self.matched.repeated,
            "scores": {one.mode: one.to_json() for one in self.scores},
            "not_scored": self.refused or None,
            "instruction_following": self.following,
            "notes": self.notes,
        }


def score_all(scorer: Scorer, only: Scoring | None, matched: Matched, closed: Sequence[str] = ()) -> Scored:
    """Score answers natively and, where there is an official script, as it does.

    Args:
        only: one rule; without it the official one may be impossible for these data, which is told.
        closed: the closed set of answers that the task declares.

    Raises:
        DeloError: data the rule cannot be applied to.
    """
    scores = [score(scorer.in_mode(only or "native"), only or "native", matched, closed)]
    refused = ""
    if only is None and scorer.compat is not None:
        try:
            scores.append(score(scorer.compat, "compat", matched, closed))
        except DeloError as error:
            refused = f"{scorer.compat.id}: {error.message}"
    following = instruction_following(matched)
    return Scored(matched, scores, refused, following, list(_notes(matched, scores)))


def score(scorer: Scorer, mode: Scoring, matched: Matched, closed: Sequence[str] = ()) -> FileScore:
    """Score the answers by `scorer`, in the way its mode treats order, ids and missing answers.

    A rule by position pairs answers and questions in the order of their files. Questions without answer count
    0, or are left out where the official script never looks at them; those that the rule does not count are.

    Raises:
        DeloError: references that lack what the rule needs, none that counts, or missing answers where the
            script fails.
    """
    references = _as_read(scorer, matched)
    scorer.check(references)
    texts = _by_position(scorer, matched) if scorer.by_position else _found(scorer, matched)
    records = [
        None
        if not scorer.is_counted(reference)
        else scorer(text, reference)
        if text is not None
        else (0.0 if scorer.unanswered == "wrong" else None)
        for text, reference in zip(texts, references, strict=True)
    ]
    counted = [value for value in records if value is not None]
    if not counted:
        raise DeloError(f"No question counts by {scorer.id}.", given=f"{len(records)} questions")
    said = [text or "" for text in texts]
    details = scorer.details(said, references) if scorer.details else {}
    percent = {name: 100 * value for name, value in details.items()}
    floor = floor_of(scorer, references, closed)
    if scorer.corpus is not None:
        whole = 100 * scorer.total(said, references)
        return FileScore(mode, scorer, whole, len(records), None, percent, records, floor)
    mean = sum(counted) / len(counted)
    error = _standard_error(counted, mean)
    return FileScore(mode, scorer, 100 * mean, len(counted), error, percent, records, floor)


def _as_read(scorer: Scorer, matched: Matched) -> list[Reference]:
    """The references as the rule reads them: with the prompt beside the answer for the question, for some."""
    if not scorer.reads_prompt:
        return matched.references
    prompts = [None if row is None else matched.answers.prompts[row] for row in matched.rows]
    return [
        reference if prompt is None else replace(reference, instruction=prompt)
        for reference, prompt in zip(matched.references, prompts, strict=True)
    ]


def _found(scorer: Scorer, matched: Matched) -> list[str | None]:
    """The answer to each question, without those that the script does not find."""
    if not scorer.text_ids:
        return matched.texts
    return [None if row in matched.answers.numbers else text
            for row, text in zip(matched.rows, matched.texts, strict=True)]  # fmt: skip


def _by_position(scorer: Scorer, matched: Matched) -> list[str | None]:
    """The n-th answer of the files for the n-th question.

    Raises:
        DeloError: fewer answers where the script fails on that, or more than questions.
    """
    texts, asked = matched.answers.texts, len(matched.references)
    if len(texts) > asked or (matched.missing and scorer.unanswered == "wrong"):
        fault = "missing answers" if matched.missing else "more answers than questions"
        raise DeloError(
            f"{scorer.id} pairs by position and its script fails on {fault}.",
            given=f"{len(texts)} answers, {asked} questions",
            fix="score with --scoring native",
        )
    return [*texts, *[None] * (asked - len(texts))]


def _notes(matched: Matched, scores: Sequence[FileScore]) -> Iterator[str]:
    """What else to know: answers that equal their references, numbers as ids, questions that do not count."""
    pairs = zip(matched.texts, matched.references, strict=True)
    if all(text == reference.answer for text, reference in pairs):
        yield "every answer equals its reference letter for letter: is the key that of the model's answers?"
    for one in scores:
        if one.scorer.text_ids and (count := sum(row in matched.answers.numbers for row in matched.rows)):
            yield f"{one.scorer.id}: {count} answers have a number as id, which its script does not find"
        if left_out := sum(not one.scorer.is_counted(reference) for reference in matched.references):
            yield f"{one.scorer.id}: {left_out} questions do not count"


def instruction_following(matched: Matched) -> dict[str, Any] | None:
    """Share of questions whose answer has the format asked for, among those that ask for a known one; None
    without any. A missing answer does not follow."""
    asked = [
        obeyed
        for text, reference in zip(matched.texts, matched.references, strict=True)
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
