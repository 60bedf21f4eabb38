"""What was forgotten, and why: points that each task lost since its own stage, by cause, with records."""

from collections.abc import Sequence
from dataclasses import dataclass

from delo_eval.answers.flips import CAUSES, Flip, TaskFlips, flip_rows, forgotten
from delo_eval.answers.predictions import prediction_file
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.report.content import RunContent
from delo_eval.report.samples import Sample, samples_of
from delo_eval.tables import Sheet

#: Lost records shown of each task.
SHOWN = 3


@dataclass(frozen=True)
class Bar:
    """Points that a task lost, as one stacked bar.

    Attributes:
        parts: (cause, points, start and width in per cent of the longest bar), those that are not empty.
        total: points.
    """

    task: str
    parts: Sequence[tuple[str, float, float, float]]
    total: float


@dataclass(frozen=True)
class Forgotten:
    """The section of the report.

    Attributes:
        bars: one for each task that could forget; causes: cause -> meaning, those that occur.
        ledger: lost records of each task: what was answered before, and the record as it is answered now.
    """

    table: Sheet
    bars: Sequence[Bar]
    causes: dict[str, str]
    ledger: Sequence[tuple[Flip, Sample]]


def forgetting_causes(content: RunContent) -> Forgotten | None:
    """What tasks lost since their own stages; None where no task was trained before the latest stage, or
    there are no earlier predictions.

    Raises:
        DeloError: predictions are damaged.
    """
    stage = content.latest
    if stage is None or stage < 1:
        return None
    own = ((task, i) for i, trained in enumerate(content.plan.stages[:stage]) for task in trained.tasks)
    if not all(prediction_file(content.folder, i, RUN_PATTERN, task).is_file() for task, i in own):
        return None  # an evaluation of the last stage alone has no earlier predictions
    found = forgotten(content.folder, content.plan, stage, content.headline_mode)
    heads = ("task", "records", "lost", *(f"by {cause}" for cause in CAUSES), "gained", "change")
    longest = max((sum(of.lost.values()) for of in found), default=0.0)
    return Forgotten(
        Sheet("Points lost and gained since a task's own stage", heads, flip_rows(found)),
        [_bar(of, longest) for of in found] if longest else [],
        {cause: words for cause, words in CAUSES.items() if any(of.lost[cause] for of in found)},
        _ledger(content, stage, found),
    )


def _bar(of: TaskFlips, longest: float) -> Bar:
    parts, start = [], 0.0
    for cause, points in of.lost.items():
        if points:
            width = 100 * points / longest
            parts.append((cause, points, round(start, 2), round(width, 2)))
            start += width
    return Bar(of.task, parts, sum(of.lost.values()))


def _ledger(content: RunContent, stage: int, found: Sequence[TaskFlips]) -> list[tuple[Flip, Sample]]:
    """The first lost records of each task, of every cause in turn."""
    chosen = {of.task: _in_turn(of.flips) for of in found}
    wanted = {task: [flip.record_id for flip in flips] for task, flips in chosen.items()}
    shown = {
        (sample.row["task"], str(sample.row["record_id"])): sample
        for sample in samples_of(content, stage, wanted)
    }
    return [(flip, shown[task, flip.record_id]) for task, flips in chosen.items() for flip in flips]


def _in_turn(flips: Sequence[Flip]) -> list[Flip]:
    """`SHOWN` losses, one of each cause after the other."""
    groups = [[flip for flip in flips if flip.cause == cause] for cause in CAUSES]
    picked: list[Flip] = []
    while len(picked) < SHOWN and any(groups):
        picked += [group.pop(0) for group in groups if group]
    return picked[:SHOWN]
