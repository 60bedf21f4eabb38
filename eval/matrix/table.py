"""The matrix as rich tables: one row after each stage, all of it with the metrics at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from delo_eval.matrix.accuracy import RUN_PATTERN, ZERO_SHOT, Cells
from delo_eval.matrix.general import general_line, general_rows
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import floor_rows, grids, standard_errors
from delo_eval.tables import rich_table, score_text

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


def stage_table(results: Mapping[str, Any], stage: int) -> Table:
    """The scores after `stage` (−1: zero-shot), a line per mode, pattern and floor; a dot: not trained."""
    plan = Plan.read(results)
    title = plan.label(stage) if stage < 0 else f"after {plan.label(stage)}"
    table = rich_table(title, ["", *plan.tasks, "mean" if stage < 0 else "mean of trained"])
    judged, known = plan.judged(stage), _rows(results, stage)
    if any(label.startswith("both") for label, _, _ in known):
        table.caption = "both: matched and oracle, which are the same"
    for label, row, errors in known:
        scores = dict(zip(plan.tasks, row, strict=True))
        marks = ["" if task in judged or score is None else "·" for task, score in scores.items()]
        cells = map(score_text, row, marks, errors)
        table.add_row(label, *cells, score_text(_mean([scores[task] for task in judged])))
    for label, row in floor_rows(results):
        judged_row = [value for task, value in zip(plan.tasks, row, strict=True) if task in judged]
        mean = None if None in judged_row else _mean(judged_row)
        table.add_row(label, *map(score_text, row), score_text(mean))
    return table


def final_table(results: Mapping[str, Any]) -> RenderableType:
    """Every stage of the run's own pattern, then the metrics of both modes, then the task choice."""
    modes, grid = results["modes"], results["matrix"]
    rest: list[RenderableType] = [_metrics(results)]
    heads, rows = general_rows(results)
    if rows:
        table = rich_table("general ability: tasks that no stage trains, percent (standard error)", heads)
        for row in rows:
            table.add_row(*row)
        rest += [table, general_line(results)]
    if len(modes) == 2 and grid["matched"] == grid["oracle"]:
        return Group(_matrix(results, "matched", "matched = oracle"), *rest)
    return Group(*(_matrix(results, mode, mode) for mode in modes), *rest)


def _rows(results: Mapping[str, Any], stage: int) -> list[tuple[str, Cells, Cells]]:
    """Label, scores and standard errors of every mode and pattern that was run at `stage`."""
    if stage < 0:
        rows = [(pattern, row, pattern, "matched") for pattern, row in (results["zero_shot"] or {}).items()]
    else:
        rows = []
        for name, grid in grids(results).items():
            modes = {mode: grid[mode][stage] for mode in results["modes"]}
            if len(modes) == 2 and modes["matched"] == modes["oracle"]:
                rows.append((f"both · {name}", modes["matched"], name, "matched"))
                continue
            rows += [(f"{mode} · {name}", row, name, mode) for mode, row in modes.items()]
    return [
        (label, row, standard_errors(results, pattern, mode, stage))
        for label, row, pattern, mode in rows
        if any(score is not None for score in row)
    ]


def _matrix(results: Mapping[str, Any], mode: str, label: str) -> Table:
    """The whole matrix of one mode, over what blind answers score."""
    plan = Plan.read(results)
    tasks, blank = plan.tasks, [""] * len(plan.tasks)
    title = f"{label}: score on (column) after training (row), percent (standard error over records)"
    table = rich_table(title, ["", *tasks])
    zero_shot = (results["zero_shot"] or {}).get("run")
    if zero_shot:
        errors = standard_errors(results, RUN_PATTERN, mode, ZERO_SHOT)
        table.add_row("zero-shot", *map(score_text, zero_shot, blank, errors))
    for stage, (name, row) in enumerate(zip(plan.names, results["matrix"][mode], strict=True)):
        errors = standard_errors(results, RUN_PATTERN, mode, stage)
        table.add_row(name, *map(score_text, row, blank, errors))
    for label, row in floor_rows(results):
        table.add_row(label, *map(score_text, row))
    return table


def _metrics(results: Mapping[str, Any]) -> Table:
    """A line per metric, a column per mode; says on how many stages they stand while not all are finished."""
    plan = Plan.read(results)
    found, total, modes = results["metrics"], len(plan.stages), results["modes"]
    heads = [
        m if found["stages"][m] == total else f"{m} ({found['stages'][m]} of {total} stages)" for m in modes
    ]
    table = rich_table(f"metrics ({plan.about})" if plan.about else "metrics", ["", *heads])
    for name in HEADLINE:
        table.add_row(name, *(score_text(found[mode].get(name)) for mode in modes))
    for key, label in CHOICE.items():
        if results[key] is not None:
            table.add_row(label, *(score_text(results[key]) if mode == "matched" else "" for mode in modes))
    return table


def _mean(row: Sequence[float | None]) -> float | None:
    known = [score for score in row if score is not None]
    return sum(known) / len(known) if known else None
