"""`AccuracyMatrix`: score[mode, stage, task, missing pattern] in percent, plus the zero-shot row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from delo_eval.matrix.plan import Plan
from delo_eval.metrics.base import Grid
from delo_llava.errors import DeloError

#: `matched`: the method chose the task of each sample (or needs none); `oracle`: it was told the true one.
Mode = Literal["matched", "oracle"]
MODES: tuple[Mode, Mode] = ("matched", "oracle")
#: The stage number of the base model before any training.
ZERO_SHOT = -1
#: The missing pattern of the run itself; the headline matrix is this one.
RUN_PATTERN = "run"

#: What cells may carry beside their score, in percent (points): the key of results.json.
Beside = Literal["standard_errors", "instruction_following"]
BESIDE: tuple[Beside, Beside] = ("standard_errors", "instruction_following")

Cells = list[float | None]
#: (mode, stage, task, pattern)
CellKey = tuple[Mode, int, str, str]


def stage_name(stage: int) -> str:
    """How folders call a stage: its index from 0, or `zero_shot`."""
    return "zero_shot" if stage == ZERO_SHOT else str(stage)


@dataclass
class AccuracyMatrix:
    """All scores of a run.

    Attributes:
        plan: the stages (rows, from 0) and the tasks (columns).
        scores: (mode, stage, task, pattern) -> percent. The zero-shot row has stage −1 and is kept once, as
            `matched`.
        counts: (task, pattern) -> how many records stand behind a score.
        beside: what else is known of cells: their standard error, the share of answers that obey the
            instruction's format.
    """

    plan: Plan
    scores: dict[CellKey, float] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    beside: dict[Beside, dict[CellKey, float]] = field(default_factory=lambda: {name: {} for name in BESIDE})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names in the order of the sequence."""
        return self.plan.tasks

    def set(
        self, mode: Mode, stage: int, task: str, score: float, *, count: int, pattern: str = RUN_PATTERN
    ) -> None:
        """Store one cell.

        Raises:
            DeloError: unknown task, stage out of range, or a cell of the same column over another number of
                records.
        """
        if task not in self.tasks:
            raise DeloError("This task is not in the matrix.", given=task, allowed=self.tasks)
        if not ZERO_SHOT <= stage <= self.plan.last:
            allowed = range(ZERO_SHOT, len(self.plan.stages))
            raise DeloError("There is no such stage.", given=stage, allowed=allowed)
        if self.counts.setdefault((task, pattern), count) != count:
            raise DeloError(
                f"Cells of {task}/{pattern} stand on other numbers of records: {self.counts[task, pattern]}.",
                given=count,
                fix="evaluate every stage with the same data, split and limit",
            )
        self.scores[mode, stage, task, pattern] = float(score)

    def note(
        self,
        name: Beside,
        mode: Mode,
        stage: int,
        task: str,
        value: float | None,
        *,
        pattern: str = RUN_PATTERN,
    ) -> None:
        """Store what else is known of a cell; None is nothing known."""
        if value is not None:
            self.beside[name][mode, stage, task, pattern] = float(value)

    def clear(self, stage: int, patterns: Iterable[str]) -> None:
        """Forget the cells of `stage` under `patterns`, before they are evaluated anew."""
        gone = set(patterns)
        self._drop(lambda key: key[1] == stage and key[3] in gone)

    def clear_tasks(self, tasks: Iterable[str]) -> None:
        """Forget the columns of some tasks, which another rule scored."""
        gone = set(tasks)
        self._drop(lambda key: key[2] in gone)

    def _drop(self, gone: Callable[[CellKey], bool]) -> None:
        for cells in (self.scores, *self.beside.values()):
            for key in [key for key in cells if gone(key)]:
                del cells[key]
        kept = {(task, pattern) for _, _, task, pattern in self.scores}
        self.counts = {key: count for key, count in self.counts.items() if key in kept}

    def row(self, mode: Mode, stage: int, pattern: str = RUN_PATTERN) -> Cells:
        """Scores of all T tasks after `stage`; None = not run."""
        return self._row(self.scores, mode, stage, pattern)

    def _row(self, cells: Mapping[CellKey, float], mode: Mode, stage: int, pattern: str) -> Cells:
        return [cells.get((mode, stage, task, pattern)) for task in self.tasks]

    def grid(self, mode: Mode, pattern: str = RUN_PATTERN) -> list[Cells]:
        """S×T scores of S stages; None = not run."""
        return self._grid(self.scores, mode, pattern)

    def _grid(self, cells: Mapping[CellKey, float], mode: Mode, pattern: str) -> list[Cells]:
        return [self._row(cells, mode, stage, pattern) for stage in range(len(self.plan.stages))]

    def zero_shot(self, pattern: str = RUN_PATTERN) -> Cells | None:
        """Scores of the base model, or None when it was not run."""
        row = self.row("matched", ZERO_SHOT, pattern)
        return None if all(score is None for score in row) else row

    @property
    def patterns(self) -> list[str]:
        """Patterns with at least one cell, the run's own first."""
        found = dict.fromkeys(pattern for _, _, _, pattern in self.scores)
        return sorted(found, key=lambda name: name != RUN_PATTERN)

    def finished_stages(self, mode: Mode, pattern: str = RUN_PATTERN) -> int:
        """k: stages 0 … k−1 each have every task that was seen."""
        stages = range(len(self.plan.stages))
        return next((i for i in stages if not self._whole(mode, i, pattern)), len(stages))

    def result_stage(self, mode: Mode, pattern: str = RUN_PATTERN) -> int | None:
        """The stage whose row is the result so far: the last finished one, or the base where none is planned.

        None as long as there is none.
        """
        if self.plan.stages:
            finished = self.finished_stages(mode, pattern)
            return finished - 1 if finished else None
        return ZERO_SHOT if self._whole(mode, ZERO_SHOT, pattern) else None

    def _whole(self, mode: Mode, stage: int, pattern: str) -> bool:
        """Whether every task that a stage is judged on was scored."""
        return all((mode, stage, task, pattern) in self.scores for task in self.plan.judged(stage))

    def finished_part(self, mode: Mode) -> tuple[Grid, Grid | None]:
        """The rows of the finished stages (nan = not run), and the zero-shot row, for the tasks seen by then.

        A sequence that is still running is scored as if it had only its first k stages. Where no stage is
        planned, the base's row is the only one, and there is none to compare it with.
        """
        stage, zero = self.result_stage(mode), self.zero_shot()
        if stage is None:
            return np.empty((0, 0)), None
        columns = [self.tasks.index(task) for task in self.plan.judged(stage)]
        rows = [self.row(mode, i) for i in range(min(0, stage), stage + 1)]
        part = np.array(rows, dtype=np.float64)[:, columns]
        if stage < 0 or zero is None:
            return part, None
        return part, np.array(zero, dtype=np.float64)[columns]

    def to_json(self) -> dict[str, Any]:
        """The keys of `results.json` that hold the matrix; `null` = not run."""
        extra = [pattern for pattern in self.patterns if pattern != RUN_PATTERN]
        zero_patterns = [pattern for pattern in self.patterns if self.zero_shot(pattern) is not None]
        return {
            "tasks": list(self.tasks),
            "plan": self.plan.to_json(),
            "matrix": self._both(RUN_PATTERN),
            "patterns": {pattern: self._both(pattern) for pattern in extra},
            "zero_shot": {pattern: self.zero_shot(pattern) for pattern in zero_patterns} or None,
            "records": {
                p: {t: self.counts[t, p] for t in self.tasks if (t, p) in self.counts} for p in self.patterns
            },
            **{name: self._beside_json(cells) for name, cells in self.beside.items()},
        }

    def _beside_json(self, cells: Mapping[CellKey, float]) -> dict[str, dict[str, Any]] | None:
        """Pattern -> `matched`, `oracle` (S×T) and `zero_shot` (T); None where nothing is known."""
        known = {pattern for _, _, _, pattern in cells}
        return {
            pattern: {
                **{mode: self._grid(cells, mode, pattern) for mode in MODES},
                "zero_shot": self._row(cells, "matched", ZERO_SHOT, pattern),
            }
            for pattern in self.patterns
            if pattern in known
        } or None

    def _both(self, pattern: str) -> dict[str, list[Cells]]:
        """Both grids of a pattern; a mode that never ran is a grid of None."""
        return {mode: self.grid(mode, pattern) for mode in MODES}

    def ran(self, mode: Mode) -> bool:
        """Whether any stage was scored in this mode; the base counts where it is the result."""
        base = not self.plan.stages
        return any(of == mode and (base or stage != ZERO_SHOT) for of, stage, _, _ in self.scores)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AccuracyMatrix":
        """The matrix in a `results.json` (or in what `to_json` gave).

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is none.
        """
        matrix = cls(Plan.read(data))
        if foreign := [
            task for stage in matrix.plan.stages for task in stage.tasks if task not in matrix.tasks
        ]:
            raise ValueError(f"its plan trains {foreign[0]!r}, which is none of its tasks")
        for pattern, counts in data["records"].items():
            matrix.counts.update({(task, pattern): count for task, count in counts.items()})
        for pattern, modes in {RUN_PATTERN: data["matrix"], **data["patterns"]}.items():
            for mode in MODES:
                matrix._fill(matrix.scores, mode, 0, pattern, modes[mode])
        for pattern, row in (data["zero_shot"] or {}).items():
            matrix._fill(matrix.scores, "matched", ZERO_SHOT, pattern, [row])
        for name, cells in matrix.beside.items():
            for pattern, found in (data.get(name) or {}).items():
                matrix._fill(cells, "matched", ZERO_SHOT, pattern, [found["zero_shot"]])
                for mode in MODES:
                    matrix._fill(cells, mode, 0, pattern, found[mode])
        return matrix

    def _fill(
        self,
        cells: dict[CellKey, float],
        mode: Mode,
        first_stage: int,
        pattern: str,
        rows: Iterable[Sequence[float | None]],
    ) -> None:
        """Store rows that start at `first_stage`."""
        for stage, row in enumerate(rows, start=first_stage):
            known = zip(self.tasks, row, strict=True)
            cells.update({(mode, stage, task, pattern): s for task, s in known if s is not None})
