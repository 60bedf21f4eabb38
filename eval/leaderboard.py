"""A comparison as a leaderboard: in the terminal, in Markdown and in LaTeX, with its differences marked."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from delo_eval.comparison import Comparison, Paired, Row, Value
from delo_eval.derived import metrics
from delo_eval.table import HEADLINE
from delo_eval.uncertainty import Contrast
from delo_llava.checkpoint.manifest import write_text_atomic

#: Columns behind the metrics: key of `Row.extras` -> title.
EXTRAS = {
    "mif": "instruction followed %",
    "task_choice_accuracy": "task chosen right %",
    "task_choice_accuracy_without_instruction": "without the instruction %",
    "parameters_per_task": "parameters per task",
}

#: Columns from which on a table is turned in the terminal.
WIDE = 9

#: Format -> file that `write` makes.
FILES = {"md": "leaderboard.md", "latex": "leaderboard.tex", "json": "compare.json"}


@dataclass(frozen=True)
class Sheet:
    """A table before it has a format.

    Attributes:
        rows: cells by row; the first `words` columns are text, the others numbers.
        best: (row, column) of the best numbers.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    best: frozenset[tuple[int, int]] = frozenset()


def sheets(comparison: Comparison) -> list[Sheet]:
    """The leaderboard, the gap between told and chosen tasks, and the paired differences, where there are."""
    gaps = [row for row in comparison.rows if row.oracle_gap]
    found = [_leaderboard(comparison)]
    if gaps:
        found.append(_gaps(comparison.tasks, gaps))
    if comparison.paired:
        found.append(_paired(comparison.tasks, comparison.paired))
    return found


def legend(comparison: Comparison) -> list[str]:
    """What a reader must know, a line each; the differences of forced rows by their number first."""
    lines = []
    if comparison.forced:
        lines.append(
            "NOT COMPARABLE, shown by force: rows with [n] differ from the first run in condition n."
        )
        lines += [f"[{i}] {d}" for i, d in enumerate(comparison.differences, start=1)]
    lines.append(
        "Percent; ± is the standard deviation over seeds, (…) the standard error over records of one run."
    )
    lines += comparison.notes
    for row in comparison.rows:
        lines += [f"{row.name}: {row.published}"] if row.published else []
        lines += [f"{row.name}: {note}" for note in row.notes]
    lines += [
        f"{p.second} against {p.first}: not computed for {p.reason}" for p in comparison.paired if p.reason
    ]
    shown = [name for name in HEADLINE if name in comparison.metric_ids]
    lines.append("Metrics: " + ", ".join(comparison.metric_ids[name] for name in shown))
    lines.append("Scorers: " + ", ".join(f"{task} {i}" for task, i in comparison.scorer_ids.items()))
    return lines


def terminal(comparison: Comparison) -> list[RenderableType]:
    """Rich tables and the legend."""
    lines = [
        Text(line, style="bold red" if comparison.forced and line.startswith(("NOT", "[")) else "")
        for line in legend(comparison)
    ]
    return [*map(_rich, sheets(comparison)), *lines]


def markdown(comparison: Comparison) -> str:
    """The sheets as Markdown tables, best numbers bold."""
    parts = [f"## {sheet.title}\n\n" + "\n".join(_markdown_rows(sheet)) for sheet in sheets(comparison)]
    notes = "\n".join(f"- {_plain(line)}" for line in legend(comparison))
    return "\n\n".join([*parts, notes]) + "\n"


def latex(comparison: Comparison) -> str:
    """The sheets as LaTeX tables (package booktabs), best numbers bold, the legend below each caption."""
    head = "% \\usepackage{booktabs}\n"
    tables = "\n".join(_latex_table(sheet) for sheet in sheets(comparison))
    notes = "\n".join(f"\\item {{}}{_tex(line)}" for line in legend(comparison))
    return f"{head}{tables}\n{{\\footnotesize\\begin{{itemize}}\n{notes}\n\\end{{itemize}}}}\n"


def write(comparison: Comparison, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the chosen formats (keys of `FILES`) into `folder` and return the files."""
    texts: dict[str, Callable[[], str]] = {
        "md": lambda: markdown(comparison),
        "latex": lambda: latex(comparison),
        "json": lambda: (
            json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in formats:
        write_text_atomic(folder / FILES[name], texts[name]())
    return [folder / FILES[name] for name in formats]


def value_text(value: Value | None) -> str:
    """`72.2 ± 1.3` over seeds, `72.2 (0.9)` of one run with its standard error."""
    if value is None:
        return "–"
    mean = round(value.mean, 2) + 0.0  # no −0.00
    if mean > 1000:
        return f"{mean:,.0f}"
    if value.std is not None:
        return f"{mean:.2f} ± {value.std:.2f}"
    return f"{mean:.2f}" if value.error is None else f"{mean:.2f} ({value.error:.2f})"


def _leaderboard(comparison: Comparison) -> Sheet:
    rows = comparison.rows
    columns: dict[str, list[Value | None]] = {}
    better: dict[str, bool] = {}
    known = metrics()
    for name in dict.fromkeys((*HEADLINE, *known)):
        if name != "last" and any(name in row.metrics for row in rows):
            columns[name] = [row.metrics.get(name) for row in rows]
            better[name] = known[name].higher_is_better
    for task in comparison.tasks:
        columns[task] = [row.scores.get(task) for row in rows]
        better[task] = True
    for pattern in dict.fromkeys(pattern for row in rows for pattern in row.patterns):
        columns[f"ap, pattern {pattern}"] = [row.patterns.get(pattern) for row in rows]
    for key, title in EXTRAS.items():
        if any(key in row.extras for row in rows):
            columns[title] = [row.extras.get(key) for row in rows]
    words = ("method", "seeds", "mode")
    best = set() if comparison.forced else _best(columns, better, len(words))
    cells = (
        (
            _name(row),
            str(len(row.seeds) or "–"),
            row.mode,
            *(value_text(column[i]) for column in columns.values()),
        )
        for i, row in enumerate(rows)
    )
    title = "Leaderboard" + (" (NOT COMPARABLE, shown by force)" if comparison.forced else "")
    return Sheet(title, (*words, *columns), tuple(cells), len(words), frozenset(best))


def _best(
    columns: Mapping[str, Sequence[Value | None]], better: Mapping[str, bool], offset: int
) -> set[tuple[int, int]]:
    """Cells with the best mean of their column, where at least two rows have one."""
    found = set()
    for j, (name, column) in enumerate(columns.items()):
        means = {i: value.mean for i, value in enumerate(column) if value is not None}
        if name in better and len(means) > 1:
            top = (max if better[name] else min)(means.values())
            found |= {(i, j + offset) for i, mean in means.items() if mean == top}
    return found


def _gaps(tasks: Sequence[str], rows: Sequence[Row]) -> Sheet:
    cells = ((_name(row), *(value_text(row.oracle_gap.get(task)) for task in tasks)) for row in rows)
    return Sheet("Points lost by choosing the task (oracle − matched)", ("method", *tasks), tuple(cells))


def _paired(tasks: Sequence[str], pairs: Sequence[Paired]) -> Sheet:
    cells = (
        (f"{p.second} − {p.first}", *(_contrast(c) for c in (p.ap, *(p.tasks[task] for task in tasks))))
        for p in pairs
    )
    title = "Paired bootstrap on the same records: difference [95 % interval] p"
    return Sheet(title, ("rows", "ap", *tasks), tuple(cells))


def _contrast(contrast: Contrast | None) -> str:
    if contrast is None:
        return "–"
    c = contrast
    p_value = "<0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}"
    return f"{c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}] {p_value}"


def _name(row: Row) -> str:
    return row.name + "".join(f" [{mark}]" for mark in row.marks)


def _rich(sheet: Sheet) -> Table:
    """A sheet for the terminal; a wide one is turned, with its columns as lines."""
    turned = len(sheet.heads) > WIDE
    lines = [[Text(head) for head in sheet.heads]]
    for i, row in enumerate(sheet.rows):
        cells = (Text(cell, style="bold" if (i, j) in sheet.best else "") for j, cell in enumerate(row))
        lines.append(list(cells))
    if turned:
        lines = [list(column) for column in zip(*lines, strict=True)]
    table = Table(title=Text(sheet.title), title_justify="left")
    for i, head in enumerate(lines[0]):
        words = 1 if turned else sheet.words
        table.add_column(head, justify="left" if i < words else "right")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _markdown_rows(sheet: Sheet) -> Iterable[str]:
    align = ["---" if i < sheet.words else "---:" for i in range(len(sheet.heads))]
    yield "| " + " | ".join(map(_plain, sheet.heads)) + " |"
    yield "|" + "|".join(align) + "|"
    for i, row in enumerate(sheet.rows):
        cells = (f"**{_plain(c)}**" if (i, j) in sheet.best else _plain(c) for j, c in enumerate(row))
        yield "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown leaves alone."""
    for sign in "\\|*_<`":
        text = text.replace(sign, f"\\{sign}")
    return text


def _latex_table(sheet: Sheet) -> str:
    align = "".join("l" if i < sheet.words else "r" for i in range(len(sheet.heads)))
    lines = [
        " & ".join(
            f"\\textbf{{{_tex(cell)}}}" if (i, j) in sheet.best else _tex(cell) for j, cell in enumerate(row)
        )
        + " \\\\"
        for i, row in enumerate(sheet.rows)
    ]
    return "\n".join(
        [
            "\\begin{table}\\centering\\footnotesize",
            f"\\caption{{{_tex(sheet.title)}}}",
            f"\\begin{{tabular}}{{{align}}}",
            "\\toprule",
            " & ".join(map(_tex, sheet.heads)) + " \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
    )


_TEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{",
    "}": "\\}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "–": "--",
    "…": "\\dots{}", "<": "$<$", ">": "$>$", "·": "$\\cdot$", "φ": "$\\phi$",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text with everything escaped that LaTeX would read."""
    return "".join(_TEX.get(sign, sign) for sign in text)
