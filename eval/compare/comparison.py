"""Runs side by side: which may share a table, their rows (mean ± std over seeds), and their differences.

Runs that were not made and judged alike are refused with every difference named; `force` shows them all the
same, each differing row marked. `delo-llava compare` and the report of several runs are made of this.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from delo_eval.compare.protocol import Difference
from delo_eval.matrix.uncertainty import Contrast


@dataclass(frozen=True)
class Value:
    """A number of one row.

    Attributes:
        mean: over the row's runs (seeds).
        std: of the sample of runs; None for a single one.
        error: standard error that the records alone cause in one run (mean over runs); None where unknown.
        values: of each run, in the order of the row's runs.
    """

    mean: float
    std: float | None = None
    error: float | None = None
    values: tuple[float, ...] = ()

    @property
    def uncertainty(self) -> float:
        """Standard error of the mean: over seeds if there are several, else over records; 0 if unknown."""
        if self.std is not None and len(self.values) > 1:
            return float(self.std / len(self.values) ** 0.5)
        return self.error or 0.0


@dataclass(frozen=True)
class BoardRow:
    """One line of the leaderboard: the runs of one method that differ only in their seed, or a published row.

    Attributes:
        name: unique label.
        method: of the runs, or as the publication calls it.
        runs: names of the runs; empty for a published row.
        folders: of the runs, in the same order.
        seeds: of the runs, in the same order.
        mode: `matched` (own task choice, or none needed) or `oracle` (true task told).
        scores: task -> score after the last finished stage, or of the base where none is trained; tasks that
            it lacks are absent.
        metrics: metric name -> value over the finished stages.
        patterns: further missing pattern -> AP under it.
        oracle_gap: task -> oracle − matched, in points; empty for methods that do not choose a task.
        extras: `task_choice_accuracy`, `task_choice_accuracy_without_instruction`, `parameters_per_task`,
            `mif`.
        published: source of a published row, else None.
        marks: numbers (from 1) of `Comparison.differences` on which this row stands apart from the first.
        notes: what a reader must know of this row.
        passports: of the runs, in the same order (`matrix.passport`); None for runs from before there were.
    """

    name: str
    method: str
    mode: str
    scores: Mapping[str, Value]
    metrics: Mapping[str, Value]
    runs: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = ()
    patterns: Mapping[str, Value] = field(default_factory=dict)
    oracle_gap: Mapping[str, Value] = field(default_factory=dict)
    extras: Mapping[str, Value] = field(default_factory=dict)
    published: str | None = None
    marks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    passports: tuple[Mapping[str, str] | None, ...] = ()


@dataclass(frozen=True)
class Paired:
    """A paired bootstrap of one row against the first row.

    Attributes:
        first, second: names of rows; differences are second − first.
        tasks: task -> contrast; None where it could not be computed.
        ap: contrast of the mean over tasks; None where a task has none.
        reason: why something is missing, else empty.
    """

    first: str
    second: str
    tasks: Mapping[str, Contrast | None]
    ap: Contrast | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown of several runs.

    Attributes:
        tasks: columns: those that the first run has seen, in the order of the sequence.
        rows: best AP first.
        reference: name of the first run's row, to which marks and contrasts refer.
        paired: a paired bootstrap of every other row of runs against the reference.
        differences: conditions on which the rows do not agree; empty unless `forced`.
        forced: shown although rows differ: every output must say so.
        stages: number of finished stages that the numbers stand on, by row.
        metric_ids, scorer_ids: of the reference.
        floors: name -> task -> what blind answers score, of the reference; see `delo_eval.matrix.floors`.
        notes: what holds for the whole table.
    """

    tasks: tuple[str, ...]
    rows: tuple[BoardRow, ...]
    reference: str
    paired: tuple[Paired, ...]
    differences: tuple[Difference, ...]
    forced: bool
    stages: Mapping[str, int]
    metric_ids: Mapping[str, str]
    scorer_ids: Mapping[str, str]
    floors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> BoardRow:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """The content of compare.json: these attributes, folders as text."""
        content = asdict(self)
        for row in content["rows"]:
            row["folders"] = [str(folder) for folder in row["folders"]]
        return {"schema": "delo-llava/compare/1", **content}
