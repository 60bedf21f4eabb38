"""General ability: what tasks kept aside, which no stage trains, score with the base and after stages.

`eval-general/<stage>.json` (stage: an index from 0, or `zero_shot`), schema `delo-llava/general/1`: `tasks`
maps a task to its `score` and `standard_error` in percent, `records`, `scorer`, `majority` (always the most
frequent answer) and, of methods that choose, `chosen` (the share of questions answered as each task).
`adapters` are hashes of what had been trained, so that a file of other adapters is not shown.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delo_eval.matrix.accuracy import ZERO_SHOT, stage_name
from delo_eval.matrix.plan import Plan
from delo_llava.files import sha256_file
from delo_llava.runs.manifest import MANIFEST
from delo_llava.runs.store import RunStore
from delo_llava.strict import read_json

#: Folder of their answers and predictions below the run's, schema of its files, and what the questions lack.
FOLDER, SCHEMA, PATTERN = "eval-general", "delo-llava/general/1", "complete"


def general_file(output: Path, stage: int) -> Path:
    """Where the scores after a stage are."""
    return output / FOLDER / f"{stage_name(stage)}.json"


def adapters_of(store: RunStore, plan: Plan, stage: int) -> list[str]:
    """The manifests' hashes of the stages up to `stage`, as far as they are published."""
    manifests = [store.adapter(name) / MANIFEST for name in plan.names[: stage + 1]]
    return [sha256_file(file) for file in manifests if file.is_file()]


def read_general(output: Path, plan: Plan, store: RunStore) -> dict[str, Any] | None:
    """The entry `general` of results.json; None where nothing was asked.

    `stages`: stage -> task -> what its file says; `base` and `last`: the mean over tasks, `last` None before
    the last stage was asked; `change`: their difference in points, None unless both stand on the same tasks,
    records and rules.
    """
    stages = {}
    for stage in range(ZERO_SHOT, len(plan.stages)):
        file = general_file(output, stage)
        if file.is_file():
            content = read_json(file, file.name, "remove it and evaluate this stage again with --general")
            known = content.get("schema") == SCHEMA
            if known and content["adapters"] == adapters_of(store, plan, stage):
                stages[stage_name(stage)] = content["tasks"]
    if not stages:
        return None
    base, last = (stages.get(stage_name(stage)) for stage in (ZERO_SHOT, plan.last))
    means = [None if row is None else _mean(row) for row in (base, last)]
    same = base is not None and last is not None and _rules(base) == _rules(last)
    change = means[1] - means[0] if same and None not in means else None  # type: ignore[operator]
    return {"pattern": PATTERN, "stages": stages, "base": means[0], "last": means[1], "change": change}


def _mean(row: Mapping[str, Mapping[str, Any]]) -> float:
    return statistics.fmean(float(cell["score"]) for cell in row.values())


def _rules(row: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    return {task: (cell["scorer"], cell["records"]) for task, cell in row.items()}


def general_line(results: Mapping[str, Any]) -> str:
    """`general ability: 91.0 → 42.5 (−48.5): numerals 92.0 → 40.0, …`; empty where nothing was asked."""
    known = results.get("general")
    if known is None:
        return ""
    plan = Plan.read(results)
    base, last = (known["stages"].get(stage_name(stage), {}) for stage in (ZERO_SHOT, plan.last))
    whole = f"{_shown(known['base'])} → {_shown(known['last'])}"
    if known["change"] is not None:
        whole += f" ({known['change']:+.1f})"
    tasks = list(dict.fromkeys([*base, *last]))
    cells = (f"{t} {_shown(_score(base, t))} → {_shown(_score(last, t))}" for t in tasks)
    return f"general ability, base → last stage: {whole}: {', '.join(cells)}"


def general_rows(results: Mapping[str, Any]) -> tuple[list[str], list[Sequence[str]]]:
    """Heads and lines of a table: a line for each stage that was asked, and the most frequent answer's."""
    known = results.get("general") or {"stages": {}}
    plan, stages = Plan.read(results), known["stages"]
    tasks = list(dict.fromkeys(task for row in stages.values() for task in row))
    rows: list[Sequence[str]] = []
    for stage in range(ZERO_SHOT, len(plan.stages)):
        row = stages.get(stage_name(stage))
        if row is not None:
            cells = [_with_error(row.get(task)) for task in tasks]
            rows.append(["base" if stage < 0 else plan.label(stage), *cells, _shown(_mean(row))])
    if rows:
        floors = [next((row[t]["majority"] for row in stages.values() if t in row), None) for t in tasks]
        rows.append(["most frequent answer", *map(_shown, floors), ""])
    return ["", *tasks, "mean"], rows


def _score(row: Mapping[str, Mapping[str, Any]], task: str) -> float | None:
    return row[task]["score"] if task in row else None


def _with_error(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    error = cell["standard_error"]
    return _shown(cell["score"]) + ("" if error is None else f" ({error:.1f})")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
