"""What is wrong with wrong answers: each is of one kind, and which answers are taken for which.

Made from prediction files alone. Kinds are tried in the order of `KINDS`; the first that fits counts, so that
they add up to the wrong answers.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from delo_eval.answers.predictions import prediction_file, read_predictions
from delo_eval.matrix.results import json_text
from delo_eval.tables import rich_table
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic

#: Kind of error -> what it means.
KINDS = {
    "empty": "nothing was said",
    "case_or_punctuation": "the reference but for case, punctuation, articles or spaces",
    "false_unanswerable": "said unanswerable although there is an answer",
    "missed_unanswerable": "answered what is unanswerable",
    "off_by_one": "a number next to the reference",
    "contains_answer": "the reference with more around it",
    "part_of_answer": "a part of the reference",
    "wrong_format": "of a form that answers of this task do not have",
    "other_answer": "of the right form, and another answer",
}

#: A score from which on an answer counts as right; soft scores lie between.
RIGHT = 0.5
#: Share of a task's references that must have a form for it to count as one of the task's.
COMMON = 0.01
#: Kept confusions and examples.
TOP, EXAMPLES = 10, 5

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*%?")
_BOX = re.compile(r"[\[(]?\s*[-+]?[\d.]+(?:\s*,\s*[-+]?[\d.]+){3}\s*[\])]?")
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


@dataclass(frozen=True)
class Confusion:
    """How often a reference was answered with a certain other answer."""

    answer: str
    prediction: str
    count: int

    def __str__(self) -> str:
        return f"{self.answer} → {self.prediction} ×{self.count}"


@dataclass(frozen=True)
class TaskErrors:
    """The wrong answers of one task.

    Attributes:
        records, wrong: counts; an answer is wrong whose score is below `RIGHT`.
        kinds: kind -> count, in the order of `KINDS`; they sum to `wrong`.
        forms: form of the references -> count.
        confusions: the most frequent pairs among `other_answer` and `off_by_one`.
        examples: kind -> ids of the first records of that kind.
    """

    task: str
    records: int
    wrong: int
    kinds: Mapping[str, int]
    forms: Mapping[str, int]
    confusions: Sequence[Confusion]
    examples: Mapping[str, Sequence[str]]


def task_errors(task: str, rows: Sequence[Mapping[str, Any]], *, oracle: bool = False) -> TaskErrors:
    """Sort the wrong answers of one task.

    Args:
        rows: its prediction rows.
        oracle: judge the answers given with the true task told.
    """
    said, judged = ("oracle_prediction", "oracle_score") if oracle else ("prediction", "score")
    forms = Counter(form(row["answer"]) for row in rows)
    common = {name for name, count in forms.items() if count >= COMMON * len(rows)}
    kinds: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    pairs: Counter[tuple[str, str]] = Counter()
    wrong = [row for row in rows if row[said] is not None and row[judged] < RIGHT]
    for row in wrong:
        kind = kind_of(row["answer"], row[said], common)
        kinds[kind] += 1
        examples.setdefault(kind, []).append(str(row["record_id"]))
        if kind in ("other_answer", "off_by_one"):
            pairs[plain(row["answer"]), plain(row[said])] += 1
    return TaskErrors(
        task,
        len(rows),
        len(wrong),
        {kind: kinds[kind] for kind in KINDS},
        dict(forms.most_common()),
        [
            Confusion(a, p, n)
            for (a, p), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:TOP]
        ],
        {kind: ids[:EXAMPLES] for kind, ids in examples.items()},
    )


def kind_of(answer: str, prediction: str, forms: Iterable[str]) -> str:
    """The kind of a wrong prediction; `forms` are those that the task's references have."""
    right, said = plain(answer), plain(prediction)
    if not prediction.strip():
        return "empty"
    if right and right == said:
        return "case_or_punctuation"
    if "unanswerable" in (right, said):
        return "false_unanswerable" if said == "unanswerable" else "missed_unanswerable"
    numbers = number(answer), number(prediction)
    if numbers[0] is not None and numbers[1] is not None:
        return "off_by_one" if abs(numbers[0] - numbers[1]) == 1 else "other_answer"
    if right and f" {right} " in f" {said} ":
        return "contains_answer"
    if said and f" {said} " in f" {right} ":
        return "part_of_answer"
    return "other_answer" if form(prediction) in forms else "wrong_format"


def form(text: str) -> str:
    """What an answer looks like: letter, yes/no, number, box, list, word, phrase, sentence or none."""
    words = plain(text).split()
    stripped = text.strip()
    if not words:
        return "none"
    if _BOX.fullmatch(stripped):
        return "box"
    if number(text) is not None:
        return "number"
    if re.fullmatch(r"\(?[A-Z]\)?[.:]?", stripped):
        return "letter"
    if words in (["yes"], ["no"]):
        return "yes/no"
    if "," in stripped.rstrip(",") and len(words) <= 20:
        return "list"
    return "word" if len(words) == 1 else "phrase" if len(words) <= 5 else "sentence"


def plain(text: str) -> str:
    """Lower-cased words without punctuation and articles; a number keeps its sign and point."""
    if _NUMBER.fullmatch(text.strip()):
        return text.strip()
    words = text.casefold().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


def number(text: str) -> float | None:
    """The number that an answer is, in digits or as a word up to ten; None for any other."""
    stripped = text.strip().rstrip(".").casefold()
    if stripped in _NUMBERS:
        return float(_NUMBERS.index(stripped))
    if not _NUMBER.fullmatch(stripped):
        return None
    try:
        return float(stripped.rstrip("%").replace(",", ""))
    except ValueError:  # 1.2.3
        return None


def run_errors(
    folder: Path, stage: int, tasks: Sequence[str], *, pattern: str = "run", oracle: bool = False
) -> list[TaskErrors]:
    """The errors of every task of one stage, from its prediction files.

    Raises:
        DeloError: a task's predictions are missing or damaged, or were not made in this mode.
    """
    found = []
    for task in tasks:
        rows = read_predictions(prediction_file(folder, stage, pattern, task))
        if oracle and any(row["oracle_score"] is None for row in rows):
            raise DeloError(f"{task} was not answered with the true task told.", given="oracle")
        found.append(task_errors(task, rows, oracle=oracle))
    return found


def write_errors(file: Path, errors: Sequence[TaskErrors], **facts: Any) -> None:
    """Write them as JSON, with what they are of (stage, pattern, mode)."""
    content = {"schema": "delo-llava/errors/1", **facts, "kinds": KINDS, "tasks": [asdict(e) for e in errors]}
    write_text_atomic(file, json_text(content))


def errors_table(errors: Sequence[TaskErrors], title: str) -> Table:
    """Kinds by task, as counts, and the most frequent confusions."""
    table = rich_table(Text(title), [Text(head) for head in ("", *(found.task for found in errors))])
    table.add_row("records", *(str(found.records) for found in errors))
    table.add_row("wrong", *(str(found.wrong) for found in errors), end_section=True)
    for kind in KINDS:
        table.add_row(kind.replace("_", " "), *(str(found.kinds[kind] or "") for found in errors))
    return table


def confusion_lines(errors: Sequence[TaskErrors], top: int = 3) -> list[Text]:
    """One line a task: the most frequent confusions, reference → answer × count."""
    return [
        Text(f"{found.task}: " + ", ".join(map(str, found.confusions[:top])))
        for found in errors
        if found.confusions
    ]
