"""`AccuracyMatrix`: score[mode, stage, task, missing pattern] in percent, plus the zero-shot row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

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
        tasks: names in training order; stage i (from 0) is the one that trained `tasks[i]`.
        scores: (mode, stage, task, pattern) -> percent. The zero-shot row has stage −1 and is kept once, as
            `matched`.
        counts: (task, pattern) -> how many records stand behind a score.
        beside: what else is known of cells: their standard error, the share of answers that obey the
            instruction's format.
    """

    tasks: tuple[str, ...]
    scores: dict[CellKey, float] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    beside: dict[Beside, dict[CellKey, float]] = field(default_factory=lambda: {name: {} for name in BESIDE})

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
        if not ZERO_SHOT <= stage < len(self.tasks):
            raise DeloError("There is no such stage.", given=stage, allowed=range(ZERO_SHOT, len(self.tasks)))
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
        for cells in (self.scores, *self.beside.values()):
            for key in [key for key in cells if key[1] == stage and key[3] in gone]:
                del cells[key]
        kept = {(task, pattern) for _, _, task, pattern in self.scores}
        self.counts = {key: count for key, count in self.counts.items() if key in kept}

    def row(self, mode: Mode, stage: int, pattern: str = RUN_PATTERN) -> Cells:
        """Scores of all T tasks after `stage`; None = not run."""
        return self._row(self.scores, mode, stage, pattern)

    def _row(self, cells: Mapping[CellKey, float], mode: Mode, stage: int, pattern: str) -> Cells:
        return [cells.get((mode, stage, task, pattern)) for task in self.tasks]

    def grid(self, mode: Mode, pattern: str = RUN_PATTERN) -> list[Cells]:
        """T×T scores, row = stage; None = not run."""
        return self._grid(self.scores, mode, pattern)

    def _grid(self, cells: Mapping[CellKey, float], mode: Mode, pattern: str) -> list[Cells]:
        return [self._row(cells, mode, stage, pattern) for stage in range(len(self.tasks))]

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
        """k: stages 0 … k−1 each have every task they were trained on."""
        grid = self.grid(mode, pattern)
        holes = (i for i, row in enumerate(grid) if None in row[: i + 1])
        return next(holes, len(grid))

    def finished_part(self, mode: Mode) -> tuple[Grid, Grid | None]:
        """The finished k×k part (nan = not run), and the first k cells of the zero-shot row.

        A sequence that is still running is scored as if it had only its first k tasks.
        """
        k = self.finished_stages(mode)
        zero = self.zero_shot()
        part = np.array([row[:k] for row in self.grid(mode)[:k]], dtype=np.float64).reshape(k, k)
        return part, None if zero is None else np.array(zero[:k], dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """The keys of `results.json` that hold the matrix; `null` = not run."""
        extra = [pattern for pattern in self.patterns if pattern != RUN_PATTERN]
        zero_patterns = [pattern for pattern in self.patterns if self.zero_shot(pattern) is not None]
        return {
            "tasks": list(self.tasks),
            "matrix": self._both(RUN_PATTERN),
            "patterns": {pattern: self._both(pattern) for pattern in extra},
            "zero_shot": {pattern: self.zero_shot(pattern) for pattern in zero_patterns} or None,
            "records": {
                p: {t: self.counts[t, p] for t in self.tasks if (t, p) in self.counts} for p in self.patterns
            },
            **{name: self._beside_json(cells) for name, cells in self.beside.items()},
        }

    def _beside_json(self, cells: Mapping[CellKey, float]) -> dict[str, dict[str, Any]] | None:
        """Pattern -> `matched`, `oracle` (T×T) and `zero_shot` (T); None where nothing is known."""
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
        """Whether any trained stage was scored in this mode."""
        return any(of == mode and stage != ZERO_SHOT for of, stage, _, _ in self.scores)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AccuracyMatrix":
        """The matrix in a `results.json` (or in what `to_json` gave)."""
        matrix = cls(tuple(data["tasks"]))
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
