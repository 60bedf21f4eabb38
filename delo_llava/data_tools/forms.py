"""Whether a reference has the form that its task's scorer needs, as far as the scorer's name tells."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from delo_llava.data.answers import accepted_answers
from delo_llava.data.faults import in_a_line
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin
from delo_llava.tasks import Record, Split, TaskSpec

#: A letter among choices, as ScienceQA's answers are.
LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")

#: How a choice begins in a question: `A. red` or `(A) red`.
CHOICE = re.compile(r"(?:^|[\s(])\(?([A-Z])[.):]\s")

#: Answers of people that the soft VQA metrics count.
PEOPLE = 10

#: What scorers need beside what they say of themselves; one of several keys is enough.
CAPTIONS = "captions|answers"
NEEDED = {"caption": (CAPTIONS,), "caption_plain": (CAPTIONS,)}


class _Scorer(Protocol):
    """What the check needs to know of a scorer; scorers belong to the harness."""

    id: str
    needs: tuple[str, ...]


def reference_faults(task: TaskSpec) -> Callable[[Record], list[tuple[str, str]]]:
    """A function that lists what is wrong with a record's reference for its scorer: (code, message)."""
    scorer, accepted = task.scorer, accepted_answers(task, "native")
    needs = (*cast(_Scorer, load_plugin("scorer", scorer)).needs, *NEEDED.get(scorer, ()))
    form = FORMS.get(scorer)

    def faults(record: Record) -> list[tuple[str, str]]:
        absent = [keys for keys in needs if not any(record.extra.get(key) for key in keys.split("|"))]
        found = [
            ("extra_missing", f"{scorer} needs `{keys.replace('|', '` or `')}`, which is absent or empty")
            for keys in absent
        ]
        told = form(record) if form else None
        try:
            accepted(record)
        except DeloError as error:
            told = told or in_a_line(error)
        return [*found, ("answer_form", f"{scorer}: {told}")] if told else found

    return faults


def right_answers(task: TaskSpec, split: Split) -> Callable[[Record], list[str]]:
    """A function that lists the texts of which each would be right: in training the one that is trained, and
    the answer as it stands where the scorer cannot use it (`reference_faults` tells that).
    """
    accepted = accepted_answers(task, "native")

    def texts(record: Record) -> list[str]:
        try:
            return [record.answer] if split == "train" else accepted(record)
        except DeloError:
            return [record.answer]

    return texts


def _box(record: Record) -> str | None:
    """Four numbers with x1 < x2 and y1 < y2, none negative."""
    given = record.extra.get("answer_bbox", record.answer)
    try:
        box = json.loads(given) if isinstance(given, str) else given
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError):
        return f"{given!r} is no box [x1, y1, x2, y2]"
    return None if 0 <= x1 < x2 and 0 <= y1 < y2 else f"{given!r} is a box without area, or leaves the image"


def _letter(record: Record) -> str | None:
    """A letter, and one of those that the question offers."""
    letter = LETTER.fullmatch(record.answer)
    if letter is None:
        return f"{record.answer!r} is no letter"
    choices = CHOICE.findall(record.instruction)
    if choices and letter[1] not in choices:
        return f"{record.answer!r} is not among the choices {', '.join(choices)}"
    return None


def _people(record: Record) -> str | None:
    """Ten answers of people."""
    given = record.extra.get("answers")
    if given is None:
        return None
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != PEOPLE:
        count = len(given) if isinstance(given, Sequence) and not isinstance(given, str) else "no list"
        return f"`answers` must be {PEOPLE} answers of people: {count}"
    blank = sum(not _text(one).strip() for one in given)
    return f"{blank} of the {PEOPLE} answers are empty" if blank else None


def _text(answer: object) -> str:
    """An answer given as text or as VQA's object."""
    return str(answer.get("answer", "")) if isinstance(answer, dict) else str(answer)


#: Scorer -> the form of its references.
FORMS: dict[str, Callable[[Record], str | None]] = {
    "grounding": _box,
    "scienceqa": _letter,
    "textvqa": _people,
    "vizwiz": _people,
    "vqav2": _people,
}
