"""What a stage is asked: which (task, pattern) cells, and the questions of each with their presence flags."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from delo_eval.answers.question import Question
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.matrix.plan import Plan
from delo_llava.config import RunConfig
from delo_llava.data.answers import require_scorable, usable_records
from delo_llava.data.missing import effective, limited, pattern_spec, record_presence
from delo_llava.data.readers import read_records
from delo_llava.tasks import Record, TaskSequence, TaskSpec


@dataclass(frozen=True)
class Cell:
    """One task under one missing pattern."""

    task: TaskSpec
    pattern: str


def cells_of(
    sequence: TaskSequence, plan: Plan, stage: int, patterns: Sequence[str], *, needs_task: bool
) -> list[Cell]:
    """The cells of one stage: every trained task under every pattern, and the next for forward transfer.

    The zero-shot row has all tasks. What the next stage trains is asked under the run's own pattern only, and
    not at all of a method that needs the true task: it has nothing to answer an untrained task with.
    """
    tasks = {task.name: task for task in sequence.tasks}
    judged = plan.judged(stage)
    cells = [Cell(tasks[name], pattern) for pattern in patterns for name in judged]
    if RUN_PATTERN in patterns and not needs_task:
        following = [name for name in plan.seen(stage + 1) if name not in judged]
        cells += [Cell(tasks[name], RUN_PATTERN) for name in following]
    return cells


@dataclass
class Questions:
    """Questions of cells; the records of the latest task are kept."""

    config: RunConfig
    _latest: tuple[TaskSpec, list[Record], list[int]] | None = None

    def of(self, cell: Cell) -> list[Question]:
        """The cell's questions in the order of the file, `eval.limit` of those that are asked.

        Presence is drawn over the whole split before that, so a record's flags depend on neither.
        """
        records, asked = self._of_task(cell.task)
        mask = record_presence(pattern_spec(cell.pattern, self.config.missing), records).tolist()
        split, limit = self.config.eval.split, self.config.eval.limit
        kept = limited([records[i].id for i in asked], cell.task.name, split, limit)
        return [Question(records[i], (mask[i][0], mask[i][1])) for i in (asked[k] for k in kept)]

    def left_out(self, task: TaskSpec) -> int:
        """How many of a task's records are not asked, as they cannot be scored."""
        records, asked = self._of_task(task)
        return len(records) - len(asked)

    def check(self, cell: Cell) -> None:
        """Refuse what could not be scored once it has been answered.

        Raises:
            DeloError: questions without what their scorer needs, by file, task and id.
        """
        asked = [question.record for question in self.of(cell)]
        require_scorable(cell.task, asked, self.config.eval.scoring)

    def missing(self, cell: Cell) -> dict[str, Any]:
        """Counts and ratios of what is missing in the cell's split."""
        return dict(effective(pattern_spec(cell.pattern, self.config.missing), self._of_task(cell.task)[0]))

    def _of_task(self, task: TaskSpec) -> tuple[list[Record], list[int]]:
        """A task's records, and the numbers of those that are asked."""
        if self._latest is None or self._latest[0] != task:
            split, chosen = self.config.eval.split, self.config.eval
            records = [
                replace(record, instruction=chosen.wording) if chosen.wording else record
                for record in read_records(task, split)
            ]
            asked = usable_records(task, records, chosen.scoring, chosen.on_bad_reference)
            self._latest = task, records, asked
        return self._latest[1:]
