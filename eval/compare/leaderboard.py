"""A comparison as a leaderboard: in the terminal, in Markdown and in LaTeX, with its differences marked."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from delo_eval.compare.comparison import BoardRow, Comparison, Paired, Value
from delo_eval.matrix.results import json_text
from delo_eval.matrix.table import HEADLINE
from delo_eval.matrix.uncertainty import Contrast
from delo_eval.metrics.base import metrics
from delo_eval.tables import Sheet, rich_table
from delo_llava.files import write_text_atomic

#: Columns behind the metrics: key of `BoardRow.extras` -> title.
EXTRAS = {
    "mif": "instruction followed %",
    "task_choice_accuracy": "task chosen right %",
    "task_choice_accuracy_without_instruction": "without the instruction %",
    "parameters_per_task": "parameters per task",
}

#: Characters from which on a table is turned in the terminal.
WIDE = 120

#: Format -> file that `write` makes.
FILES = {"md": "leaderboard.md", "latex": "leaderboard.tex", "json": "compare.json"}


def sheets(comparison: Comparison) -> list[Sheet]:
    """The leaderboard's tables, the gap between told and chosen tasks, and paired differences."""
    gaps = [row for row in comparison.rows if row.oracle_gap]
    found = [sheet for sheet in _boards(comparison) if len(sheet.heads) > sheet.words]
    if gaps:
        found.append(_gaps(comparison.tasks, gaps))
    if comparison.paired:
        found.append(_paired(comparison.tasks, comparison.paired))
    mark = " (NOT COMPARABLE, shown by force)" if comparison.forced else ""
    return [replace(sheet, title=sheet.title + mark) for sheet in found]


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
    if not comparison.forced and len(comparison.rows) > 1:
        lines.append("Marked: the best of a column, and all that lie within the 95 % error of it.")
    lines += comparison.notes
    for row in comparison.rows:
        lines += [f"{row.name}: {row.published}"] if row.published else []
        lines += [f"{row.name}: {note}" for note in row.notes]
        if known := [passport["id"] for passport in row.passports if passport]:
            lines.append(f"{row.name}: passport {', '.join(known)}")
    lines += [
        f"{p.second} against {p.first}: not computed for {p.reason}" for p in comparison.paired if p.reason
    ]
    ids = comparison.metric_ids
    lines.append("Metrics: " + ", ".join(ids[name] for name in _shown_metrics(comparison) if name in ids))
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
    parts = [f"## {sheet.title}\n\n" + markdown_table(sheet) for sheet in sheets(comparison)]
    notes = "\n".join(f"- {_plain(line)}" for line in legend(comparison))
    return "\n\n".join([*parts, notes]) + "\n"


def markdown_table(sheet: Sheet) -> str:
    """One sheet as a Markdown table, best numbers bold."""
    return "\n".join(_markdown_rows(sheet))


def latex(comparison: Comparison) -> str:
    """The sheets as LaTeX tables (packages booktabs, graphicx), never wider than a line; the legend below."""
    head = "% \\usepackage{booktabs,graphicx}\n"
    tables = "\n".join(_latex_table(sheet) for sheet in sheets(comparison))
    notes = "\n".join(f"\\item {{}}{_tex(line)}" for line in legend(comparison))
    return f"{head}{tables}\n{{\\footnotesize\\begin{{itemize}}\n{notes}\n\\end{{itemize}}}}\n"


def write(comparison: Comparison, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the chosen formats (keys of `FILES`) into `folder` and return the files."""
    texts: dict[str, Callable[[], str]] = {
        "md": lambda: markdown(comparison),
        "latex": lambda: latex(comparison),
        "json": lambda: json_text(comparison.to_json()),
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
    if mean >= 1000:
        return f"{mean:,.0f}"
    if value.std is not None:
        return f"{mean:.2f} ± {value.std:.2f}"
    return f"{mean:.2f}" if value.error is None else f"{mean:.2f} ({value.error:.2f})"


def _boards(comparison: Comparison) -> list[Sheet]:
    """Metrics, scores by task, and what else is known of rows: three tables, each as wide as a page."""
    rows, known = comparison.rows, metrics()
    shown = [name for name in _shown_metrics(comparison) if any(name in row.metrics for row in rows)]
    patterns = dict.fromkeys(pattern for row in rows for pattern in row.patterns)
    board = {name: [row.metrics.get(name) for row in rows] for name in shown}
    scores = {task: [row.scores.get(task) for row in rows] for task in comparison.tasks}
    beside = {
        **{f"ap, pattern {pattern}": [row.patterns.get(pattern) for row in rows] for pattern in patterns},
        **{title: [row.extras.get(key) for row in rows] for key, title in EXTRAS.items()},
    }
    better = {name: known[name].higher_is_better for name in shown}
    after = _board("Scores after the last stage", comparison, scores, dict.fromkeys(scores, True))
    floors = (
        (label, *(value_text(Value(row[task]) if task in row else None) for task in after.heads[1:]))
        for label, row in comparison.floors.items()
    )
    return [
        _board("Leaderboard", comparison, board, better, ("seeds", "mode")),
        replace(after, rows=(*after.rows, *floors)),
        _board("Other missing patterns, instructions, task choice, size", comparison, beside, {}),
    ]


def _board(
    title: str,
    comparison: Comparison,
    columns: Mapping[str, Sequence[Value | None]],
    better: Mapping[str, bool],
    words: tuple[str, ...] = (),
) -> Sheet:
    """A line per row; columns that no row fills are left out, and nothing is best among rows that differ."""
    filled = {name: column for name, column in columns.items() if any(column)}
    heads = ("method", *words)
    about = {"seeds": lambda row: str(len(row.seeds) or "–"), "mode": lambda row: row.mode}
    cells = (
        (_name(row), *(about[word](row) for word in words), *(value_text(c[i]) for c in filled.values()))
        for i, row in enumerate(comparison.rows)
    )
    best = set() if comparison.forced else _best(filled, better, len(heads))
    return Sheet(title, (*heads, *filled), tuple(cells), len(heads), frozenset(best))


def _shown_metrics(comparison: Comparison) -> list[str]:
    """Metrics with a column: the headline ones first; `last` is `ap` under another name."""
    names = dict.fromkeys((*HEADLINE, *metrics()))
    return [name for name in names if name != "last" and name in {*comparison.metric_ids, *metrics()}]


def _best(
    columns: Mapping[str, Sequence[Value | None]], better: Mapping[str, bool], offset: int
) -> set[tuple[int, int]]:
    """Cells with the best mean of their column and those that lie within its 95 % error of it, where at least
    two rows have one.
    """
    found = set()
    for j, (name, column) in enumerate(columns.items()):
        known = {i: value for i, value in enumerate(column) if value is not None}
        if name in better and len(known) > 1:
            top = (max if better[name] else min)(known.values(), key=lambda value: value.mean)
            found |= {(i, j + offset) for i, value in known.items() if _alike(top, value)}
    return found


def _alike(best: Value, other: Value) -> bool:
    """Whether the errors of both leave open which one is better."""
    return abs(best.mean - other.mean) <= 1.96 * math.hypot(best.uncertainty, other.uncertainty)


def _gaps(tasks: Sequence[str], rows: Sequence[BoardRow]) -> Sheet:
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


def _name(row: BoardRow) -> str:
    return row.name + "".join(f" [{mark}]" for mark in row.marks)


def _rich(sheet: Sheet) -> Table:
    """A sheet for the terminal; a wide one is turned, with its columns as lines."""
    columns = zip(sheet.heads, *sheet.rows, strict=True)
    turned = sum(max(map(len, column)) + 3 for column in columns) > WIDE
    lines = [[Text(head) for head in sheet.heads]]
    for i, row in enumerate(sheet.rows):
        cells = (Text(cell, style="bold" if (i, j) in sheet.best else "") for j, cell in enumerate(row))
        lines.append(list(cells))
    if turned:
        lines = [list(column) for column in zip(*lines, strict=True)]
    table = rich_table(Text(sheet.title), lines[0], 1 if turned else sheet.words)
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
    """Text on one line that Markdown leaves alone."""
    return re.sub(r"([\\|*_<`\[\]&$~])", r"\\\1", " ".join(text.split()))


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
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{{align}}}",
            "\\toprule",
            " & ".join(map(_tex, sheet.heads)) + " \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}}",
            "\\end{table}",
        ]
    )


_TEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{",
    "}": "\\}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "–": "--",
    "…": "\\dots{}", "<": "$<$", ">": "$>$", "·": "$\\cdot$", "φ": "$\\phi$",
    "|": "\\textbar{}", "[": "{[}", "]": "{]}", "→": "$\\to$",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text on one line with everything escaped that LaTeX would read."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", " ".join(text.split()))  # a minus sign is no hyphen
    return "".join(_TEX.get(sign, sign) for sign in text)
