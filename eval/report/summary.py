"""The head of the page: what was run, how far it came, its metrics, and what a reader should be warned of."""

from collections.abc import Sequence
from typing import Any

from delo_eval.matrix.accuracy import RUN_PATTERN, ZERO_SHOT, stage_name
from delo_eval.matrix.results import score_row
from delo_eval.matrix.table import HEADLINE
from delo_eval.metrics.base import metrics
from delo_eval.report.content import Json, RunContent, value_at
from delo_eval.report.matrices import missing_words
from delo_llava.data.omitted import LABELS
from delo_llava.tasks import StagePlan

#: Words for the headline figures.
TILES = {"ap": "average (AP)", "forgetting": "forgetting", "maa": "average over stages (MAA)"}


def tiles(content: RunContent) -> list[tuple[str, str, str]]:
    """(name, value, what it is) of the figures to see first."""
    results, mode = content.results, content.headline_mode
    found = [
        (words, _shown(results["metrics"][mode].get(name)), f"{mode} task") for name, words in TILES.items()
    ]
    told = results["metrics"]["oracle"].get("ap")
    if mode == "matched" and results["task_choice"]:
        found.append(("average, task told", _shown(told), "oracle task"))
        found.append(("task chosen right", _shown(results["task_choice_accuracy"], " %"), "all views"))
        blind = results["task_choice_accuracy_without_instruction"]
        found.append(("task chosen right", _shown(blind, " %"), "without the instruction"))
    return [tile for tile in found if tile[1] != "–"]


def facts(content: RunContent) -> list[tuple[str, str]]:
    """What was run, a line each."""
    results, config, record = content.results, content.config, content.record
    weights, train = results["start_weights"], config.get("train") or {}
    batch = f"{train.get('global_batch')} ({train.get('micro_batch')} a rank and pass)"
    pairs = [
        ("method", results["method"]),
        ("method's options", _options((config.get("methods") or {}).get(results["method"]))),
        ("sequence", f"{results['task_seq']}: {' → '.join(content.tasks)}"),
        ("stages", content.plan.about),
        ("base", f"{weights['name']} (sha256 {_short(weights['sha256'])})"),
        ("quantisation", results["quant"]),
        ("engine", f"ZeRO {results['zero']} on {results['world'] or '?'} rank(s)"),
        ("seed", str(results["seed"])),
        ("missing", missing_words(results["missing"]["spec"])),
        ("missing seed", str(results["missing"]["spec"]["seed"])),
        ("evaluated", f"{results['split']}, {_limit(results['limit'])}"),
        ("scoring", str(value_at(config, "eval", "scoring") or "native")),
        ("global batch", batch if train else ""),
        ("learning rate", f"{train.get('lr')}" if train else ""),
        (
            "passport",
            " · ".join(f"{part} {value}" for part, value in (results.get("passport") or {}).items()),
        ),
        ("differs from the run", "; ".join(results.get("differs") or [])),
        ("changed within the run", "; ".join(change["key"] for change in results.get("changes") or [])),
        ("commit", str(value_at(record, "versions", "git") or "")),
    ]
    return [(name, value) for name, value in pairs if value]


def versions(content: RunContent) -> list[tuple[str, str]]:
    """Package and version."""
    known = content.results["versions"] or {}
    return [(name, str(version or "not installed")) for name, version in known.items()]


def hashes(content: RunContent) -> list[tuple[str, str]]:
    """What was hashed and its sha256: base, data by task and split, published adapters' manifests."""
    rows = [("base weights", str(content.results["start_weights"]["sha256"] or "not a local folder"))]
    for task, of_task in (content.results["data_hashes"] or {}).items():
        splits = of_task.items() if isinstance(of_task, dict) else [("", of_task)]
        rows += [(f"data {task} {split}".strip(), str(value)) for split, value in splits]
    for task, stage in (content.record.get("stages") or {}).items():
        if "manifest" in stage:
            rows.append((f"adapter {task} (manifest)", str(stage["manifest"])))
    return rows


def scorers(content: RunContent) -> list[tuple[str, str]]:
    """Task and its scorer's id with version."""
    return list(content.results["scorer_ids"].items())


def metric_rows(content: RunContent) -> list[list[str]]:
    """Every metric: name, value per mode, formula, direction, id."""
    results, known = content.results, metrics()
    return [
        [
            name,
            *(_shown(results["metrics"][mode].get(name), digits=2) for mode in results["modes"]),
            known[name].formula,
            "higher" if known[name].higher_is_better else "lower",
            results["metric_ids"].get(name, ""),
        ]
        for name in dict.fromkeys((*(name for name in HEADLINE if name in known), *known))
    ]


def stages(content: RunContent) -> list[dict[str, Any]]:
    """Per stage: how far it is, what training recorded, its tasks' records and seconds; where none is
    planned, the base.
    """
    if not content.plan.stages:
        state = "to do" if content.latest is None else "evaluated"
        spent = value_at(content.results, "seconds", "zero_shot")
        return [_stage_row(content, StagePlan("base", content.plan.tasks), "base", {}, state, (None, spent))]
    return [_planned(content, i, stage) for i, stage in enumerate(content.plan.stages)]


def _planned(content: RunContent, i: int, planned: StagePlan) -> dict[str, Any]:
    """The line of stage `i`."""
    results, recorded = content.results, value_at(content.record, "stages", planned.name) or {}
    cells = [
        score
        for mode in ("matched", "oracle")
        for task, score in zip(content.tasks, score_row(results, RUN_PATTERN, mode, i), strict=True)
        if task in planned.tasks
    ]
    evaluated = any(score is not None for score in cells)
    trained = bool(recorded.get("train_seconds")) or evaluated
    state = "evaluated" if evaluated else "trained" if trained else "to do"
    seconds = tuple(value_at(results, "seconds", what, i) for what in ("train", "eval"))
    return _stage_row(content, planned, f"{i + 1} {planned.name}", recorded, state, seconds)


def _stage_row(
    content: RunContent,
    planned: StagePlan,
    label: str,
    recorded: Json,
    state: str,
    seconds: Sequence[float | None],
) -> dict[str, Any]:
    """A line of the table of stages: what is counted is summed over the stage's tasks, and what is missing is
    told where there is one.
    """
    results, tasks = content.results, planned.tasks
    counts = [n for task in tasks if (n := value_at(results, "records", "run", task)) is not None]
    effective = [
        value_at(results, "missing", *path, tasks[0]) if len(tasks) == 1 else None
        for path in (("effective_train",), ("effective", "run"))
    ]
    return {
        "task": label,
        "state": state,
        "parameters": _count(value_at(results, "trainable_parameters_per_task", planned.name)),
        "samples": _count(recorded.get("samples")),
        "steps": _count(recorded.get("steps")),
        "train": _seconds(seconds[0]),
        "test": _count(sum(counts) if counts else None),
        "eval": _seconds(seconds[1]),
        "missing_train": _missing(effective[0]),
        "missing_test": _missing(effective[1]),
    }


def omitted(content: RunContent) -> list[list[str]]:
    """What training and evaluation left out: stage, task, records, and every count of `LABELS`; only lines
    with any.
    """
    results, plan = content.results, content.plan
    found: list[tuple[str, str, str, Json]] = []
    for name in plan.names:
        trained = value_at(content.record, "stages", name, "omitted") or {}
        found += [(name, task, "train", counts) for task, counts in trained.items()]
    for stage, label in enumerate(["zero-shot", *plan.names], start=ZERO_SHOT):
        patterns = value_at(results, "omitted", stage_name(stage)) or {}
        for pattern, tasks in patterns.items():
            split = results["split"] + ("" if pattern == RUN_PATTERN else f" ({pattern})")
            found += [(label, task, split, counts) for task, counts in tasks.items()]
    return [[*place, *(_count(counts.get(key)) for key in LABELS)] for *place, counts in found]


def progress(content: RunContent) -> tuple[int, int]:
    """(stages evaluated, stages in all); the base is one where none is planned."""
    rows = stages(content)
    return sum(row["state"] == "evaluated" for row in rows), len(rows)


def warnings(content: RunContent) -> list[str]:
    """What the run noted of its data before it began, and what makes its numbers provisional."""
    results = content.results
    told = [str(note) for note in content.record.get("notes") or []]
    for stage, by_pattern in (results.get("bad_images") or {}).items():
        count = sum(len(records) for tasks in by_pattern.values() for records in tasks.values())
        told.append(f"Stage {stage}: {count} answers were counted wrong as their image cannot be used.")
    if results.get("wording"):
        told.append(f"Every instruction was replaced by: {results['wording']}")
    if results["limit"] is not None:
        told.append(f"A trial: at most {results['limit']} records of each task were evaluated (eval.limit).")
    max_steps = value_at(content.config, "train", "max_steps")
    if max_steps is not None:
        told.append(f"Training ended after {max_steps} steps of each stage (train.max_steps).")
    finished, total = progress(content)
    if 0 < finished < total:
        told.append(f"The sequence is not finished: metrics stand on the first {finished} of {total} stages.")
    return list(dict.fromkeys(told))


def _missing(effective: Json | None) -> str:
    """`35% / 35%`: without image, without context."""
    if not effective or "image_ratio" not in effective:
        return "–"
    return f"{effective['image_ratio']:.0%} / {effective['text_ratio']:.0%}"


def _options(options: Json | None) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in (options or {}).items())


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _limit(limit: int | None) -> str:
    return "all records" if limit is None else f"at most {limit} records a task"


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "unknown"


def _shown(value: float | None, unit: str = "", digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
