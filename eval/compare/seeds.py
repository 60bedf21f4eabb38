"""Mean ± standard deviation over seeds of finished runs, as a Markdown table and JSON; rows that differ are
never merged.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delo_eval.compare.protocol import Protocol, differences, protocol, without_missing_seed
from delo_eval.compare.runs import settings_of, spread
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import ResultsJson, json_text, judged_mode, read_results, score_row
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic


def _conditions(folder: Path, results: ResultsJson) -> Protocol:
    """What must agree between runs that share a row, beside method and missing setting."""
    same = {key: results[key] for key in ("task_seq", "quant")}
    return {**without_missing_seed(protocol(results)), **same, **settings_of(folder)}


def _metric(name: str, mode: str | None = None) -> Callable[[ResultsJson], float | None]:
    return lambda results: results["metrics"][mode or judged_mode(results)][name]


def _pattern_ap(pattern: str) -> Callable[[ResultsJson], float | None]:
    """Mean of the last row when every test record has this missing pattern."""

    def value(results: ResultsJson) -> float | None:
        row = score_row(results, pattern, judged_mode(results), Plan.read(results).last)
        known = [score for score in row if score is not None]
        return statistics.fmean(known) if len(known) == len(row) else None

    return value


def _parameters(results: ResultsJson) -> float | None:
    """Trainable parameters of a stage, on average; None where none is trained."""
    counts = results["trainable_parameters_per_task"].values()
    return statistics.fmean(counts) if counts else None


#: Column title -> value of one run; None where a run has no such number.
COLUMNS: dict[str, Callable[[ResultsJson], float | None]] = {
    "AP": _metric("ap"),
    "forgetting": _metric("forgetting"),
    "AP, task told": _metric("ap", "oracle"),
    "task chosen right %": lambda results: results["task_choice_accuracy"],
    "without the instruction %": lambda results: results["task_choice_accuracy_without_instruction"],
    "AP, no image": _pattern_ap("image"),
    "AP, no context": _pattern_ap("text"),
    "parameters per task": _parameters,
}


def summarise_seeds(root: Path, settings: Sequence[str], methods: Sequence[str]) -> str:
    """Read `<root>/<setting>/<method>-s<seed>/results.json`, write `table.md` and `table.json` in `root`.

    Returns:
        the Markdown table.

    Raises:
        DeloError: runs of one row that were not made alike.
    """
    rows = []
    for setting in settings:
        for method in methods:
            runs = {
                f: r
                for f in sorted((root / setting).glob(f"{method}-s*"))
                if (r := read_results(f)) and r["metrics"]["complete"]
            }
            if runs:
                _check_alike(runs)
                rows.append(
                    {
                        "setting": setting,
                        "method": method,
                        "runs": [folder.name for folder in runs],
                        **_columns(list(runs.values())),
                    }
                )
    table = _markdown(rows)
    root.mkdir(parents=True, exist_ok=True)
    write_text_atomic(root / "table.json", json_text(rows))
    write_text_atomic(root / "table.md", table + "\n")
    return table


def _columns(runs: Sequence[ResultsJson]) -> dict[str, dict[str, Any]]:
    """Column -> mean, std (of the sample; None for one run) and the values."""
    columns = {}
    for title, value in COLUMNS.items():
        values = [v for v in map(value, runs) if v is not None]
        if values:
            found = spread(values)
            columns[title] = {"mean": found.mean, "std": found.std, "values": values}
    return columns


def _check_alike(runs: Mapping[Path, ResultsJson]) -> None:
    apart = differences({folder.name: _conditions(folder, results) for folder, results in runs.items()})
    if apart:
        raise DeloError(
            "Runs of one row differ, so their numbers do not compare: " + "; ".join(map(str, apart)),
            fix="run them again alike",
        )


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = [title for title in COLUMNS if any(title in row for row in rows)]
    lines = ["| setting | method | seeds | " + " | ".join(titles) + " |", "|---" * (3 + len(titles)) + "|"]
    for row in rows:
        cells = [_cell(row[title]) if title in row else "–" for title in titles]
        lines.append(
            f"| {row['setting']} | {row['method']} | {len(row['runs'])} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def _cell(column: Mapping[str, Any]) -> str:
    mean, std = column["mean"], column["std"]
    if mean > 1000:
        return f"{mean:,.0f}"
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
