"""`results.json`: everything a run reports, by the schema `delo-llava/results/1` (docs/results.md)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delo_eval.matrix.accuracy import (
    MODES,
    RUN_PATTERN,
    ZERO_SHOT,
    AccuracyMatrix,
    Beside,
    Cells,
    stage_name,
)
from delo_eval.matrix.derived import oracle_gap, summarise
from delo_eval.matrix.floors import floor_of
from delo_eval.matrix.plan import Plan
from delo_eval.metrics.base import metrics
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.config import RunConfig
from delo_llava.data.omitted import Omitted
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic
from delo_llava.strict import read_json

#: The content of a results.json.
ResultsJson = Mapping[str, Any]

SCHEMA = "delo-llava/results/1"
FILE = "results.json"
#: Folder in a run's, of results under one wording for all tasks (`delo-eval --wording`).
WORDED = "eval-wording"
#: What readers of the file rely on.
REQUIRED = (
    "method", "seed", "split", "limit", "tasks", "matrix", "patterns", "zero_shot", "records", "modes",
    "metrics", "task_choice", "missing", "seconds",
)  # fmt: skip


@dataclass
class Results:
    """What accumulates from stage to stage; the rest of the file follows from it and from the run.

    Attributes:
        matrix: all scores.
        choices: stage -> pattern -> accuracy and confusion of the task choice; empty for methods that do not
            choose.
        effective: pattern -> task -> counts and ratios of what was missing in the evaluated records.
        eval_seconds: stage (−1 is the zero-shot row) -> seconds of its latest evaluation.
        answers: stage (a name) -> how many answers of that evaluation were `stored` before it and `new`.
        bad_images: stage (a name) -> pattern -> task -> records counted wrong as their image cannot be used.
        differs: how the base or the data that answered differ from the run's own; results of such an
            evaluation lie in a folder of their own.
        floors: task -> what blind answers score (`Floor`).
        omitted: stage (a name) -> pattern -> task -> counts of what was left out (`Omitted`).
    """

    matrix: AccuracyMatrix
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    effective: dict[str, dict[str, Any]] = field(default_factory=dict)
    eval_seconds: dict[int, float] = field(default_factory=dict)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)
    bad_images: dict[str, dict[str, dict[str, list[str]]]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    floors: dict[str, dict[str, Any]] = field(default_factory=dict)
    omitted: dict[str, dict[str, dict[str, dict[str, int]]]] = field(default_factory=dict)

    def forget(self, stage: int, patterns: list[str]) -> None:
        """Drop what is about to be evaluated anew."""
        self.matrix.clear(stage, patterns)
        for pattern in patterns:
            self.choices.get(str(stage), {}).pop(pattern, None)
            self.bad_images.get(stage_name(stage), {}).pop(pattern, None)
            self.omitted.get(stage_name(stage), {}).pop(pattern, None)

    def note_bad_images(self, stage: int, pattern: str, task: str, records: list[str]) -> None:
        """Store which records of one cell could not be shown, if any."""
        if records:
            by_pattern = self.bad_images.setdefault(stage_name(stage), {})
            by_pattern.setdefault(pattern, {})[task] = records

    def note_omitted(self, stage: int, pattern: str, task: str, omitted: Omitted) -> None:
        """Store what was left out of one cell, if anything."""
        if counts := omitted.counts():
            by_pattern = self.omitted.setdefault(stage_name(stage), {})
            by_pattern.setdefault(pattern, {})[task] = counts

    def note_floor(
        self, task: str, scorer: Scorer, references: Sequence[Reference], answers: Sequence[str]
    ) -> None:
        """Store what blind answers to a task score, once for a rule and a number of questions."""
        known = self.floors.get(task, {})
        if (known.get("scorer"), known.get("records")) == (scorer.id, len(references)):
            return
        floor = floor_of(scorer, references, answers)
        if floor is None:
            self.floors.pop(task, None)
        else:
            self.floors[task] = floor.to_json()

    def note_choice(self, stage: int, pattern: str, statistics: dict[str, Any] | None) -> None:
        """Store the task choice of one stage under one pattern, if there was any."""
        if statistics is not None:
            self.choices.setdefault(str(stage), {})[pattern] = statistics

    def latest_choice(self) -> dict[str, Any]:
        """The task choice after the latest stage, under the run's own missing pattern; empty without one."""
        stages = sorted((int(stage) for stage, by in self.choices.items() if RUN_PATTERN in by), reverse=True)
        found: dict[str, Any] = self.choices[str(stages[0])][RUN_PATTERN] if stages else {}
        return found


def results_json(results: Results, config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """The whole file.

    Args:
        facts: what the run recorded and the harness cannot know (see `run_facts`).
    """
    matrix, latest = results.matrix, results.latest_choice()
    stages = range(len(matrix.plan.stages))
    return {
        "schema": SCHEMA,
        "method": config.method,
        "task_seq": config.task_seq,
        "seed": config.seed,
        "quant": config.quant,
        "zero": facts["zero"],
        "world": facts["world"],
        "split": config.eval.split,
        "limit": config.eval.limit,
        "wording": config.eval.wording,
        **matrix.to_json(),
        "modes": [mode for mode in MODES if matrix.ran(mode)],
        "metrics": summarise(matrix),
        "oracle_gap": oracle_gap(matrix) if results.choices else None,
        "metric_ids": {name: metric.id for name, metric in metrics().items()},
        "scoring": config.eval.scoring,
        "scorer_ids": facts["scorer_ids"],
        "floors": {task: results.floors[task] for task in matrix.tasks if task in results.floors},
        "task_choice_accuracy": latest.get("accuracy"),
        "task_choice_accuracy_without_instruction": latest.get("accuracy_without_instruction"),
        "task_choice": results.choices or None,
        "trainable_parameters_per_task": facts["trainable_parameters_per_task"],
        "missing": {
            "spec": config.missing.model_dump(mode="json"),
            "effective": results.effective,
            "effective_train": facts["missing_train"],
        },
        "bad_images": {stage: found for stage, found in results.bad_images.items() if found},
        "omitted": {stage: found for stage, found in results.omitted.items() if found},
        "passport": facts["passport"],
        "differs": results.differs,
        "changes": facts["changes"],
        "start_weights": facts["start_weights"],
        "data_hashes": facts["data_hashes"],
        "versions": facts["versions"],
        "seconds": {
            "train": facts["train_seconds"],
            "eval": [results.eval_seconds.get(stage) for stage in stages],
            "zero_shot": results.eval_seconds.get(ZERO_SHOT),
            "answers": results.answers,
        },
        **({"general": facts["general"]} if facts.get("general") else {}),
    }


def write_results(folder: Path, content: dict[str, Any]) -> None:
    """Replace `folder`/results.json in one step; refuses NaN, which is not JSON."""
    write_text_atomic(folder / FILE, json_text(content))


def json_text(content: Any) -> str:
    """JSON for readers: indented, letters as they are; refuses NaN, which is not JSON."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def judged_mode(results: ResultsJson) -> str:
    """How a method is judged: by its own task choice, or with the true task where it cannot choose."""
    return "matched" if "matched" in results["modes"] else "oracle"


def grids(results: ResultsJson) -> dict[str, dict[str, list[Cells]]]:
    """Missing pattern -> mode -> S×T scores, the run's own pattern first."""
    return {RUN_PATTERN: results["matrix"], **results["patterns"]}


def score_row(results: ResultsJson, pattern: str, mode: str, stage: int) -> Cells:
    """Scores after `stage` (−1: zero-shot, whatever the mode); None for every cell that was not run."""
    if stage == ZERO_SHOT:
        rows = {ZERO_SHOT: (results["zero_shot"] or {}).get(pattern)}
    else:
        rows = dict(enumerate(grids(results).get(pattern, {}).get(mode, [])))
    return rows.get(stage) or [None] * len(results["tasks"])


def beside_row(results: ResultsJson, name: Beside, pattern: str, mode: str, stage: int) -> Cells:
    """What else is known of the cells of a row (as `score_row`); None for every cell where nothing is."""
    known = (results.get(name) or {}).get(pattern)
    if known is None:
        return [None] * len(results["tasks"])
    row: Cells = known["zero_shot"] if stage == ZERO_SHOT else known[mode][stage]
    return row


def standard_errors(results: ResultsJson, pattern: str, mode: str, stage: int) -> Cells:
    """Standard errors of a row, in points."""
    return beside_row(results, "standard_errors", pattern, mode, stage)


#: Label -> key of a floor, for the rows that stand under scores.
FLOORS = {"most frequent answer": "majority", "chance": "chance"}


def floor_rows(results: ResultsJson) -> list[tuple[str, Cells]]:
    """What blind answers score on each task, a row for each floor that is known of any."""
    known = results.get("floors") or {}
    rows = [
        (label, [(known.get(task) or {}).get(key) for task in results["tasks"]])
        for label, key in FLOORS.items()
    ]
    return [(label, row) for label, row in rows if any(value is not None for value in row)]


def result_stage(results: ResultsJson, mode: str) -> int | None:
    """The stage whose row is the result so far: see `AccuracyMatrix.result_stage`."""
    finished: int = results["metrics"]["stages"][mode]
    if Plan.read(results).stages:
        return finished - 1 if finished else None
    return ZERO_SHOT if results["metrics"]["complete"] else None


def read_results(folder: Path) -> dict[str, Any] | None:
    """The content of `folder`/results.json, None when there is none.

    Raises:
        DeloError: not JSON, of another schema, without what the schema demands, or with names of tasks and
            patterns that would lead out of the folder.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    fix = "move it away and evaluate again"
    content = read_json(file, FILE, fix)
    if content.get("schema") != SCHEMA:
        raise DeloError("results.json has another schema.", given=content.get("schema"), allowed=[SCHEMA])
    if lacks := [key for key in REQUIRED if key not in content]:
        raise DeloError(f"results.json lacks {', '.join(lacks)}.", given=file, fix=fix)
    try:
        AccuracyMatrix.from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeloError(f"The matrix in results.json is damaged: {error!r}", given=file, fix=fix) from error
    names = [*content["tasks"], *content["patterns"]]
    if outside := [name for name in names if "/" in name or "\0" in name or name in ("", ".", "..")]:
        raise DeloError("A name in results.json is no name of a folder.", given=repr(outside[0]), fix=fix)
    return content


def resume_results(folder: Path, config: RunConfig, plan: Plan) -> Results:
    """What earlier evaluations left in `folder`, or an empty start.

    Raises:
        DeloError: the file there is of another method, sequence, split, limit or scoring, whose cells would
            not compare.
    """
    content = read_results(folder)
    if content is None:
        return Results(AccuracyMatrix(plan))
    # Files from before there were two modes, or a plan.
    content = {"scoring": "native", "wording": None} | content | {"plan": Plan.read(content).to_json()}
    expected = {
        "scoring": config.eval.scoring, "method": config.method, "tasks": list(plan.tasks),
        "plan": plan.to_json(), "seed": config.seed, "split": config.eval.split, "limit": config.eval.limit,
        "wording": config.eval.wording,
    }  # fmt: skip
    for key, value in expected.items():
        if content[key] != value:
            raise DeloError(
                f"{folder / FILE} holds results of another {key}: {content[key]}.",
                given=value,
                fix="choose another --output",
            )
    seconds = {i: s for i, s in enumerate(content["seconds"]["eval"]) if s is not None}
    if content["seconds"]["zero_shot"] is not None:
        seconds[ZERO_SHOT] = content["seconds"]["zero_shot"]
    return Results(
        AccuracyMatrix.from_json(content),
        content["task_choice"] or {},
        content["missing"]["effective"],
        seconds,
        content["seconds"].get("answers", {}),
        content.get("bad_images", {}),
        content.get("differs", []),
        content.get("floors") or {},
        content.get("omitted", {}),
    )
