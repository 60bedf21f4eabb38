"""One page about several runs: leaderboard, paired differences, matrices side by side, curves overlaid."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from delo_eval.compare.comparison import BoardRow, Comparison
from delo_eval.compare.leaderboard import legend, sheets
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.report.charts import Chart, Drawn, Line, drawn
from delo_eval.report.content import RunContent, read_content
from delo_eval.report.learning import loss_overlay
from delo_eval.report.matrices import HeatTable, course, heat_table
from delo_eval.report.render import render
from delo_llava.files import write_text_atomic

FILE = "compare.html"

SECTIONS = (
    ("board", "Leaderboard"), ("curves", "Forgetting"), ("matrices", "Matrices"), ("learning", "Learning"),
    ("folders", "Runs"),
)  # fmt: skip


def render_comparison(comparison: Comparison, output: Path) -> Path:
    """Write the page about a comparison.

    Args:
        comparison: of `delo_eval.compare.assemble.compare`; its rows name the folders to read.
        output: folder for `compare.html`, made where it is missing.

    Returns:
        the page.

    Raises:
        DeloError: a run's folder is gone or damaged.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / FILE
    write_text_atomic(file, render("compare.html.j2", comparison_parts(comparison)))
    return file


def comparison_parts(comparison: Comparison) -> dict[str, Any]:
    """Everything the template shows."""
    runs = [row for row in comparison.rows if row.folders]
    contents = {row.name: [read_content(folder) for folder in row.folders] for row in runs}
    return {
        "names": [row.name for row in comparison.rows],
        "forced": comparison.forced,
        "legend": legend(comparison),
        "sheets": sheets(comparison),
        "curves": curves(comparison.tasks, runs, contents),
        "tables": side_by_side(runs, contents),
        "learning": loss_overlay({name: found[0] for name, found in contents.items()}),
        "rows": [
            [row.name, row.method, row.mode, ", ".join(map(str, row.seeds)), ", ".join(map(str, row.folders))]
            for row in runs
        ],
        "sections": SECTIONS,
    }


def curves(
    tasks: Sequence[str], rows: Sequence[BoardRow], contents: Mapping[str, Sequence[RunContent]]
) -> list[Drawn]:
    """The mean over trained tasks, then each task from its own stage on; a line per row, its seeds' mean.

    Rows whose stages are not one for each task have no place on this axis.
    """
    rows = [row for row in rows if contents[row.name][0].plan.one_task_each]
    charts = []
    for j, name in enumerate(["mean of trained tasks", *tasks]):
        lines = [
            Line(row.name, points, style)
            for style, row in enumerate(rows)
            if (
                points := mean_course([course(c, row.mode, j - 1 if j else None) for c in contents[row.name]])
            )
        ]
        ends = "; ".join(f"{line.label}: {line.points[-1][1]:.1f} at last" for line in lines)
        figure = drawn(
            Chart(
                title=name, lines=lines, x_label="after stage", y_label="score %", y_range=(0.0, 100.0),
                x_ticks=[(float(i), str(i + 1)) for i in range(len(tasks))],
                summary=f"Score on {name}, in percent. {ends}.",
            )
        )  # fmt: skip
        if figure is not None:
            charts.append(figure)
    return charts


def mean_course(courses: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several courses at the places that all of them have."""
    values = [dict(points) for points in courses]
    shared = [x for x in values[0] if all(x in found for found in values)] if values else []
    return [(x, sum(found[x] for found in values) / len(values)) for x in shared]


def side_by_side(rows: Sequence[BoardRow], contents: Mapping[str, Sequence[RunContent]]) -> list[HeatTable]:
    """The matrix of every run in the mode its row is judged by."""
    tables = []
    for row in rows:
        for folder, content in zip(row.folders, contents[row.name], strict=True):
            table = heat_table(content, RUN_PATTERN, row.mode)
            if table is not None:
                tables.append(replace(table, caption=f"{row.name} ({folder.name}, {row.mode})"))
    return tables
