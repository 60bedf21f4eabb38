"""Small run folders: results.json, config.yaml and predictions, written by the harness's own functions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from delo_eval.answers.predictions import prediction_file
from delo_eval.matrix.accuracy import AccuracyMatrix
from delo_eval.matrix.derived import cell_score
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import Results, results_json, write_results
from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.exact_match import SCORER
from delo_llava.config import RunConfig, dump_config
from delo_llava.files import write_text_atomic

TASKS = ("science", "ocr")
RECORDS = 40

FACTS: dict[str, Any] = {
    "world": 1,
    "zero": "2",
    "passport": {"id": "0" * 12, "files": "f" * 12},
    "start_weights": {"name": "mini-llava", "sha256": "a" * 64},
    "data_hashes": {task: {"train": "b" * 64, "test": "c" * 64} for task in TASKS},
    "versions": {"torch": "2.6"},
    "changes": [],
    "trainable_parameters_per_task": dict.fromkeys(TASKS, 1000),
    "train_seconds": [1.0, 2.0],
    "missing_train": {},
}


def outcomes(right: Sequence[float], seed: int = 0, records: int = RECORDS) -> dict[str, np.ndarray]:
    """Task -> 0/1 per record, `right` of them 1, at places drawn by the seed."""
    random = np.random.default_rng(seed)
    drawn = {}
    for task, share in zip(TASKS, right, strict=True):
        scores = np.zeros(records)
        scores[random.permutation(records)[: round(share * records)]] = 1
        drawn[task] = scores
    return drawn


def write_run(
    folder: Path,
    final: dict[str, np.ndarray],
    *,
    config: RunConfig | None = None,
    facts: dict[str, Any] | None = None,
    oracle: dict[str, np.ndarray] | None = None,
    stages: int = 2,
    scorer: Scorer = SCORER,
    **changes: Any,
) -> Path:
    """A run of two tasks whose last stage has these outcomes; after the first stage its task scored 100.

    Args:
        config: of the run; its config.yaml.
        facts: laid over `FACTS`.
        oracle: outcomes with the true task told.
        stages: evaluated ones.
        scorer: of both tasks.
        changes: keys of results.json to replace.
    """
    config = config or RunConfig(method="lora")
    matrix = AccuracyMatrix(Plan.one_each(TASKS))
    for stage in range(stages):
        for task in TASKS[: stage + 1]:
            scores = final[task] if stage else np.ones(len(final[task]))
            told = (oracle or final)[task] if stage else scores
            _write_cell(folder, matrix, stage, task, scores, told, scorer)
    ids = {"scorer_ids": dict.fromkeys(TASKS, scorer.id)}
    content = results_json(Results(matrix), config, {**FACTS, **ids, **(facts or {})})
    write_results(folder, {**content, **changes})
    write_text_atomic(folder / "config.yaml", dump_config(config))
    return folder


def _write_cell(
    folder: Path,
    matrix: AccuracyMatrix,
    stage: int,
    task: str,
    scores: np.ndarray,
    told: np.ndarray,
    scorer: Scorer,
) -> None:
    """One cell of the matrix and its prediction file, last record first."""
    references = [Reference(f"{task}-{i}", "yes") for i in range(len(scores))]
    said = {"matched": scores, "oracle": told}
    for mode, values in said.items():
        words = ["yes" if value else "no" for value in values]
        value, error = cell_score(words, values.tolist(), scorer, references)
        matrix.set(mode, stage, task, value, count=len(scores))  # type: ignore[arg-type]
        matrix.note("standard_errors", mode, stage, task, error)  # type: ignore[arg-type]
    lines = [
        {
            "record_id": references[i].id, "task": task, "answer": "yes",
            "prediction": "yes" if scores[i] else "no", "score": scores[i],
            "oracle_prediction": "yes" if told[i] else "no", "oracle_score": told[i],
        }
        for i in reversed(range(len(scores)))
    ]  # fmt: skip
    file = prediction_file(folder, stage, "run", task)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, "".join(json.dumps(line) + "\n" for line in lines))
