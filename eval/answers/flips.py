"""What became of every record between two evaluations: what was lost and why, and what was gained.

Made from prediction files alone. A lost answer has one cause, the first of `CAUSES` that fits.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from delo_eval.answers.errors import RIGHT, kind_of, plain
from delo_eval.answers.predictions import Prediction, prediction_file, read_predictions
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import json_text
from delo_eval.tables import rich_table
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic

#: Cause of a loss -> what it means.
CAUSES = {
    "format": "the answer is there, in other words around it, other case or punctuation",
    "routing": "with the true task told it is still right",
    "style": "an answer that other tasks have and this one never has (SEFE: superficial forgetting)",
    "knowledge": "another answer of the task's own",
}
#: Kinds of error that are a matter of form.
FORM = ("case_or_punctuation", "contains_answer")
SAID: Mapping[str, str] = {"matched": "prediction", "oracle": "oracle_prediction"}
JUDGED: Mapping[str, str] = {"matched": "score", "oracle": "oracle_score"}


@dataclass(frozen=True)
class Flip:
    """A record whose score changed.

    Attributes:
        presence: what of it was shown, `image` and `text`.
        before, after: the answers; points: change of its score, −1 … 1.
        cause: of a loss, a key of `CAUSES`; empty for a gain.
    """

    record_id: str
    presence: Mapping[str, bool]
    answer: str
    before: str
    after: str
    points: float
    cause: str


@dataclass(frozen=True)
class TaskFlips:
    """One task between two evaluations; numbers are points, per cent of its records.

    Attributes:
        lost: cause -> points; gained: points.
        change: gained − Σ lost, the difference of the two scores where a score is a mean over records.
        flips: every record whose score changed, losses first.
    """

    task: str
    records: int
    lost: Mapping[str, float]
    gained: float
    change: float
    flips: Sequence[Flip]


def task_flips(
    task: str,
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    mode: str = "matched",
    others: Container[str] = (),
    mode_before: str | None = None,
) -> TaskFlips:
    """Compare two evaluations of one task's records.

    Args:
        mode: in which answers are judged; `mode_before` of those before, if it is another.
        others: answers of other tasks, as `errors.plain` has them.

    Raises:
        DeloError: they are of other records, showed other modalities of them, or were not both made in this
            mode.
    """
    for key, what in (
        ("record_id", "asked the same records"),
        ("presence", "shown the same of every record"),
    ):
        if [row[key] for row in before] != [row[key] for row in after]:
            raise DeloError(
                f"The two evaluations of {task} were not {what}, so no record can be compared.",
                given=f"{len(before)} and {len(after)} records",
                fix="compare runs on the same data and missing seed, or --pattern complete",
            )
    sides = ((before, mode_before or mode), (after, mode))
    for rows, judged in sides:
        if not rows or any(row[JUDGED[judged]] is None for row in rows):
            raise DeloError(f"{task} was not answered in both evaluations.", given=judged)
    said, scores = ([[row[of[judged]] for row in rows] for rows, judged in sides] for of in (SAID, JUDGED))
    own = {plain(row["answer"]) for row in before}
    flips = []
    for new, answers, (old, now) in zip(
        after, zip(*said, strict=True), zip(*scores, strict=True), strict=True
    ):
        if old != now:
            cause = _cause(new, old, mode, own, others) if now < old else ""
            name, first, second = str(new["record_id"]), *answers
            flips.append(Flip(name, new["presence"], new["answer"], first, second, now - old, cause))
    share = 100 / len(before)
    lost = {cause: share * sum(-f.points for f in flips if f.cause == cause) for cause in CAUSES}
    gained = share * sum(f.points for f in flips if f.points > 0)
    flips.sort(key=lambda flip: flip.points)
    return TaskFlips(task, len(before), lost, gained, gained - sum(lost.values()), flips)


def forgotten(folder: Path, plan: Plan, stage: int, mode: str, pattern: str = RUN_PATTERN) -> list[TaskFlips]:
    """What became of every task since its own stage; tasks of stage `stage` itself and of later ones have
    nothing to forget.

    Args:
        folder: with `predictions/`.

    Raises:
        DeloError: predictions are missing, damaged, or not of this mode.
    """
    own = {task: i for i, trained in enumerate(plan.stages[:stage]) for task in trained.tasks}
    now = {t: read_predictions(prediction_file(folder, stage, pattern, t)) for t in plan.judged(stage)}
    then = {task: read_predictions(prediction_file(folder, i, pattern, task)) for task, i in own.items()}
    return changes(then, now, mode)


def changes(
    before: Mapping[str, Sequence[Prediction]],
    after: Mapping[str, Sequence[Prediction]],
    mode: str,
    mode_before: str | None = None,
) -> list[TaskFlips]:
    """What became of every task of `before`; arguments as of `task_flips`, by task.

    Raises:
        DeloError: as `task_flips`.
    """
    answers = {task: {plain(row["answer"]) for row in rows} for task, rows in after.items()}
    found = []
    for task, rows in before.items():
        others = set().union(*(texts for name, texts in answers.items() if name != task))
        found.append(task_flips(task, rows, after[task], mode, others, mode_before))
    return found


def _cause(new: Prediction, old: float, mode: str, own: set[str], others: Container[str]) -> str:
    """Why a record that scored `old` lost points, a key of `CAUSES`."""
    said = new[SAID[mode]]
    if kind_of(new["answer"], said, ()) in FORM:
        return "format"
    told = new["oracle_score"]
    if mode == "matched" and told is not None and told > new["score"] and told >= min(old, RIGHT):
        return "routing"
    return "style" if plain(said) in others and plain(said) not in own else "knowledge"


def write_flips(file: Path, found: Sequence[TaskFlips], **facts: Any) -> None:
    """Write them as JSON, with what they are of."""
    content = {"schema": "delo-llava/flips/1", **facts, "causes": CAUSES, "tasks": [asdict(f) for f in found]}
    write_text_atomic(file, json_text(content))


def flips_table(found: Sequence[TaskFlips], title: str) -> Table:
    """Points lost by cause and gained, a row for each task."""
    heads = ("task", "records", "lost", *(f"by {cause}" for cause in CAUSES), "gained", "change")
    table = rich_table(Text(title), [Text(head) for head in heads])
    for row in flip_rows(found):
        table.add_row(*row)
    return table


def flip_rows(found: Sequence[TaskFlips]) -> list[list[str]]:
    """Cells: task, records, points lost, by each cause, gained, change."""
    return [
        [
            of.task,
            f"{of.records:,}",
            f"{sum(of.lost.values()):.1f}",
            *(f"{points:.1f}" for points in of.lost.values()),
            f"{of.gained:.1f}",
            f"{of.change:+.1f}",
        ]
        for of in found
    ]
