"""The matrix as rich tables: one row after each stage, all of it with the metrics at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table

from delo_eval.matrix.accuracy import Cells

#: Metrics shown below the matrix, in this order; the rest is in results.json.
HEADLINE = (
    "ap",
    "maa",
    "mft",
    "forgetting",
    "forgetting_max",
    "forgetting_max_all",
    "bwt_T",
    "bwt_Tm1",
    "fwt",
)

#: Shares of rightly chosen tasks, shown below the metrics.
CHOICE = {
    "task_choice_accuracy": "task choice",
    "task_choice_accuracy_without_instruction": "task choice without instruction",
}


def show(*parts: RenderableType) -> None:
    """Write tables and lines to standard output; numbers are never cut to a narrow terminal or pipe."""
    console = Console()
    tables = (part for part in parts if isinstance(part, Table))
    widths = [Measurement.get(console, console.options.update(max_width=10_000), t).maximum for t in tables]
    console.width = max(console.width, *widths, 0)
    console.print(*parts, sep="\n")


def stage_table(results: Mapping[str, Any], stage: int) -> Table:
    """The scores after `stage` (−1: zero-shot), a line per mode and pattern; a dot marks untrained tasks."""
    tasks = results["tasks"]
    title = "zero-shot" if stage < 0 else f"after stage {stage} ({tasks[stage]})"
    table = _table(title, ["", *tasks, "mean of trained"])
    for label, row, errors in _rows(results, stage):
        marks = ["" if j <= stage or score is None else "·" for j, score in enumerate(row)]
        cells = map(_cell, row, marks, errors)
        table.add_row(label, *cells, _cell(_mean(row[: stage + 1])))
    return table


def final_table(results: Mapping[str, Any]) -> RenderableType:
    """Every stage of the run's own pattern, then the metrics of both modes, then the task choice."""
    return Group(*(_matrix(results, mode) for mode in results["modes"]), _metrics(results))


def _rows(results: Mapping[str, Any], stage: int) -> list[tuple[str, Cells, Cells]]:
    """Label, scores and standard errors of every mode and pattern that was run at `stage`."""
    if stage < 0:
        rows = [(pattern, row, pattern, "zero_shot") for pattern, row in (results["zero_shot"] or {}).items()]
    else:
        grids = {"run": results["matrix"], **results["patterns"]}
        rows = [
            (f"{mode} · {name}", grids[name][mode][stage], name, mode)
            for name in grids
            for mode in results["modes"]
        ]
    return [
        (label, row, _errors(results, pattern, mode, stage))
        for label, row, pattern, mode in rows
        if any(score is not None for score in row)
    ]


def _errors(results: Mapping[str, Any], pattern: str, mode: str, stage: int) -> Cells:
    """Standard errors of one row (mode may be `zero_shot`); None for all in results that have none."""
    known = (results.get("standard_errors") or {}).get(pattern)
    if known is None:
        return [None] * len(results["tasks"])
    row: Cells = known[mode] if mode == "zero_shot" else known[mode][stage]
    return row


def _matrix(results: Mapping[str, Any], mode: str) -> Table:
    """The whole matrix of one mode."""
    tasks = results["tasks"]
    title = f"{mode}: score on (column) after training (row), percent (standard error over records)"
    table = _table(title, ["", *tasks])
    zero_shot = (results["zero_shot"] or {}).get("run")
    if zero_shot:
        table.add_row(
            "zero-shot", *map(_cell, zero_shot, _blank(tasks), _errors(results, "run", "zero_shot", -1))
        )
    for stage, (name, row) in enumerate(zip(tasks, results["matrix"][mode], strict=True)):
        table.add_row(name, *map(_cell, row, _blank(tasks), _errors(results, "run", mode, stage)))
    return table


def _blank(tasks: Sequence[str]) -> list[str]:
    return [""] * len(tasks)


def _metrics(results: Mapping[str, Any]) -> Table:
    """A line per metric, a column per mode; says on how many stages they stand while not all are finished."""
    found, total, modes = results["metrics"], len(results["tasks"]), results["modes"]
    heads = [
        m if found["stages"][m] == total else f"{m} ({found['stages'][m]} of {total} stages)" for m in modes
    ]
    table = _table("metrics", ["", *heads])
    for name in HEADLINE:
        table.add_row(name, *(_cell(found[mode].get(name)) for mode in modes))
    for key, label in CHOICE.items():
        if results[key] is not None:
            table.add_row(label, *(_cell(results[key]) if mode == "matched" else "" for mode in modes))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _cell(score: float | None, mark: str = "", error: float | None = None) -> str:
    if score is None:
        return "-"
    return f"{score:.2f}{mark}" if error is None else f"{score:.2f}{mark} ({error:.1f})"


def _mean(row: Sequence[float | None]) -> float | None:
    known = [score for score in row if score is not None]
    return sum(known) / len(known) if known else None
