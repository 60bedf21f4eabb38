"""Answers laid beside the questions they belong to: by id or by line, with a policy for ids that repeat."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from delo_eval.answers.files import LISTED, FileAnswers
from delo_eval.scorers.base import Reference
from delo_llava.errors import DeloError

#: What to do with further answers to a question: refuse, keep the last, or count each as a question.
Repeated = Literal["refuse", "last", "each"]


@dataclass(frozen=True)
class Matched:
    """Answers laid beside the questions.

    Attributes:
        references: what each answer is judged against; with `each` a question stands once for every answer.
        rows: by reference, the place of its answer among all answers of the files; None where there is none.
        answers: all of them, in the order of the files.
        missing: ids of questions without answer.
        repeated: how many answers are to a question that had one.
    """

    references: list[Reference]
    rows: list[int | None]
    answers: FileAnswers
    missing: list[str]
    repeated: int = 0

    @property
    def texts(self) -> list[str | None]:
        """By reference, what was answered."""
        return [None if row is None else self.answers.texts[row] for row in self.rows]


def match_by_line(answers: FileAnswers, references: Sequence[Reference], *, allow_missing: bool) -> Matched:
    """The n-th answer to the n-th question, whatever the ids.

    Raises:
        DeloError: more answers than questions, or fewer where none may be missing.
    """
    given, asked = len(answers.texts), len(references)
    if given > asked or (given < asked and not allow_missing):
        raise DeloError(
            f"{given} answers cannot be paired by line with {asked} questions.",
            given=_named(answers),
            fix="use the file of questions that these answers were made from"
            + (", or count the last ones wrong: --allow-missing" if given < asked else ""),
        )
    rows = [row if row < given else None for row in range(asked)]
    return Matched(list(references), rows, answers, [each.id for each in references[given:]])


def match(
    answers: FileAnswers,
    references: Sequence[Reference],
    *,
    allow_missing: bool,
    repeated: Repeated = "refuse",
) -> Matched:
    """Lay the answers beside the questions by id.

    Questions whose ids repeat in their file are called `<id>`, `<id>~2` … and so are their answers;
    `repeated` is about answers beyond these.

    Raises:
        DeloError: answers to unknown questions, several to one, or questions without answer that are not
            allowed; all of it in one error, with counts and ids.
    """
    wanted = {reference.id: reference for reference in references}
    row_of: dict[str, int] = {}
    again: dict[str, list[int]] = {}
    unknown, count = [], Counter[str]()
    for row, given in enumerate(answers.ids):
        count[given] += 1
        name = given if count[given] == 1 else f"{given}~{count[given]}"
        if name in wanted:
            row_of[name] = row
        elif given in wanted:
            again.setdefault(given, []).append(row)
        else:
            unknown.append(given)
    missing = [each.id for each in references if each.id not in row_of]
    surplus = [name for name, rows in again.items() for _ in rows]
    _require_fit(answers, references, unknown, surplus if repeated == "refuse" else [],
                 [] if allow_missing else missing)  # fmt: skip
    if not row_of:
        raise DeloError("No question has an answer.", given=_named(answers))
    if repeated == "last":
        row_of |= {name: rows[-1] for name, rows in again.items()}
    beside = [(each, row_of.get(each.id)) for each in references]
    if repeated == "each":
        beside = [pair for each, row in beside for pair in _each(each, row, again.get(each.id, []))]
    kept, rows = [each for each, _ in beside], [row for _, row in beside]
    return Matched(kept, rows, answers, missing, len(surplus))


def _each(reference: Reference, row: int | None, again: Iterable[int]) -> list[tuple[Reference, int | None]]:
    """A question once for every answer to it."""
    more = [
        (replace(reference, id=f"{reference.id}~{number}"), row) for number, row in enumerate(again, start=2)
    ]
    return [(reference, row), *more]


def _require_fit(
    answers: FileAnswers,
    references: Sequence[Reference],
    unknown: Sequence[str],
    surplus: Sequence[str],
    missing: Sequence[str],
) -> None:
    """Refuse what does not fit, all of it in one error.

    Raises:
        DeloError: with counts, ids and what may be done.
    """
    told = {
        "answers to unknown questions": unknown,
        "answers to questions that have one": surplus,
        "questions without answer": missing,
    }
    faults = [_fault(what, ids) for what, ids in told.items() if ids]
    if not faults:
        return
    remedies = []
    if unknown:
        remedies.append("name the file of questions that these answers were made from (--references)")
        if len(answers.ids) <= len(references):
            remedies.append("pair them by line (--by-line)")
    if surplus:
        remedies += ["keep the last answer to each id (--repeated last)", "count each (--repeated each)"]
    if missing and not unknown:
        remedies.append("count missing answers wrong (--allow-missing)")
    raise DeloError(
        f"{len(answers.ids)} answers do not fit {len(references)} questions:\n" + "\n".join(faults),
        given=_named(answers),
        fix=", or ".join(remedies),
    )


def _fault(what: str, ids: Sequence[str]) -> str:
    """One line of the error."""
    more = f", … ({len(ids) - LISTED} more)" if len(ids) > LISTED else ""
    return f"  {len(ids)} {what}: {', '.join(ids[:LISTED])}{more}"


def _named(answers: FileAnswers) -> str:
    return ", ".join(str(file) for file in answers.files[:LISTED])
