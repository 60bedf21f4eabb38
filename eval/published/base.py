"""Published tables: read, and what their rows allow recomputed.

Every number is a publication's; nothing here was measured by this project.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from pydantic import model_validator

from delo_eval.metrics.base import metrics
from delo_llava.registry import load_plugin
from delo_llava.schema import Section, checked, read_yaml

#: How sure the numbers are.
CERTAINTY = {
    "V": "read at its source",
    "C": "recalled, then confirmed by arithmetic against aggregates that were read",
    "R": "recalled, not read again",
    "I": "inferred",
    "unstated": "not recorded",
}

PrintedCells = tuple[float | None, ...]


class PublishedProtocol(Section):
    """How the numbers were made, as far as it is known.

    Attributes:
        task_seq: the recipe of the same data, or None when it is not known to be the same.
        data: the data as the source names it.
        start_weights: in words.
        start_names: hub ids of these weights; a run from another model never shares the table.
        scoring: `compat` is the benchmark's official scripts.
        training: what else is known of it.
        order: `training`, or what the columns' order is instead.
    """

    task_seq: str | None
    data: str
    start_weights: str
    start_names: tuple[str, ...] = ()
    scoring: Literal["native", "compat"]
    split: str
    training: str = ""
    order: str


class PublishedRow(Section):
    """One method.

    Attributes:
        kind: `zero_shot` rows are no result of training.
        immediate, final: score of each column's task right after its training, after the last one; null where
            it is not at hand.
        aggregates: printed name -> printed number.
        decimals: to which aggregates are printed.
        unchecked: printed name -> why it cannot be recomputed from the row.
    """

    method: str
    kind: Literal["trained", "zero_shot"] = "trained"
    immediate: PrintedCells | None = None
    final: PrintedCells | None = None
    aggregates: dict[str, float] = {}
    decimals: int = 2
    unchecked: dict[str, str] = {}
    note: str = ""


class PublishedTable(Section):
    """A table as its source prints it.

    Attributes:
        certainty: a key of `CERTAINTY`.
        tasks: columns.
        aggregates: printed name -> metric of this project with the same divisor and convention.
        unchecked: printed name -> why it cannot be recomputed from any row.
    """

    title: str
    source: str
    certainty: Literal["V", "C", "R", "I", "unstated"]
    protocol: PublishedProtocol
    tasks: tuple[str, ...]
    aggregates: dict[str, str]
    unchecked: dict[str, str] = {}
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "PublishedTable":
        """Rows are as long as the table is wide, and print nothing that the table does not explain."""
        for row in self.rows:
            given = [cells for cells in (row.immediate, row.final) if cells is not None]
            if any(len(cells) != len(self.tasks) for cells in given):
                raise ValueError(f"{row.method}: {len(self.tasks)} cells are needed")
            if len({cells[-1] for cells in given}) > 1:
                raise ValueError(f"{row.method}: the last task's two scores are one cell and differ")
            if unknown := set(row.aggregates) - set(self.aggregates):
                raise ValueError(f"{row.method}: no metric is named for {sorted(unknown)}")
        return self


@dataclass(frozen=True)
class Recomputed:
    """A printed aggregate against what its row gives.

    Attributes:
        tolerance: the largest difference that rounding of printed numbers explains.
    """

    method: str
    name: str
    printed: float
    recomputed: float
    tolerance: float

    @property
    def follows(self) -> bool:
        """Whether the printed number follows from the row."""
        return abs(self.printed - self.recomputed) <= self.tolerance + 1e-9


def load_table(name: str) -> PublishedTable:
    """A table by name, or the YAML file of one's own.

    Raises:
        DeloError: no such table, or a file that is not one.
    """
    path = Path(name) if Path(name).suffix == ".yaml" else cast(Path, load_plugin("published", name))
    return checked(PublishedTable, read_yaml(path), where=f"the published table {path.name}")


def recomputed(table: PublishedTable) -> Iterator[Recomputed]:
    """Recompute every printed aggregate that its row allows.

    From cells: rounding moves a mean by half a unit of the last place, a difference of two means by one.
    From printed means (final − immediate, times T/(T−1) or 1): the same, scaled.
    """
    count = len(table.tasks)
    for row in table.rows:
        half = 0.5 * 10.0**-row.decimals
        by_metric = {table.aggregates[name]: value for name, value in row.aggregates.items()}
        for name, printed in row.aggregates.items():
            metric = table.aggregates[name]
            value = _from_cells(row, metric, count)
            if value is not None:
                spread = 0.005 * (1 if metric in ("ap", "mft") else 2 * count / (count - 1))
                yield Recomputed(row.method, name, printed, value, half + spread)
            elif metric in (scale := _scales(count)) and {"ap", "mft"} <= set(by_metric):
                value = scale[metric] * (by_metric["ap"] - by_metric["mft"])
                yield Recomputed(row.method, name, printed, value, half + 2 * half * abs(scale[metric]))


def _from_cells(row: PublishedRow, metric: str, count: int) -> float | None:
    """The metric of the matrix of which only the diagonal and the last row may be known."""
    if metric not in metrics():
        return None
    grid = np.full((count, count), np.nan)
    if row.immediate is not None:
        np.fill_diagonal(grid, [np.nan if cell is None else cell for cell in row.immediate])
    if row.final is not None:
        grid[-1] = [np.nan if cell is None else cell for cell in row.final]
    return metrics()[metric](grid)


def _scales(count: int) -> dict[str, float]:
    """Metric -> its factor on (mean of final − mean of immediate scores)."""
    over = count / (count - 1)
    return {"bwt_T": 1.0, "bwt_Tm1": over, "forgetting": -over}
