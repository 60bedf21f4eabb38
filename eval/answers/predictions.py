"""Predictions on disk: what was said to each question of a cell, with its score.

`predictions/<stage>/<pattern>/<task>.jsonl`, one object a line; stage is the index from 0, or `zero_shot`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delo_eval.answers.question import Answer, Question
from delo_eval.matrix.accuracy import stage_name
from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.mif import obeys
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic
from delo_llava.strict import parse_json

Prediction = dict[str, Any]


def prediction_file(output: Path, stage: int, pattern: str, task: str) -> Path:
    """Where the predictions of one cell lie."""
    return output / "predictions" / stage_name(stage) / pattern / f"{task}.jsonl"


def prediction_of(question: Question, answer: Answer, scorer: Scorer, stage: int, pattern: str) -> Prediction:
    """One line: the question, what was visible, what was said, its score, and how the task was chosen."""
    record, (image, text) = question.record, question.presence
    reference = Reference.of(record)

    def score(said: str | None) -> float | None:
        if said is None or answer.image_fault is not None:
            return None if said is None else 0.0
        return scorer(said, reference)

    row = {
        "record_id": record.id,
        "task": record.task,
        "stage": stage,
        "pattern": pattern,
        "presence": {"image": image, "text": text},
        "answer": record.answer,
        "prediction": answer.prediction,
        "score": score(answer.prediction),
        "follows": obeys(answer.prediction, reference),
        "oracle_prediction": answer.oracle,
        "oracle_score": score(answer.oracle),
        "oracle_follows": None if answer.oracle is None else obeys(answer.oracle, reference),
        "task_used": answer.task_used,
        "task_without_instruction": answer.task_without_instruction,
        "choice_scores": answer.choice_scores,
    }
    told = {"fallback": answer.fallback, "cut": answer.cut, "unended": answer.unended}
    row |= {key: list(names) for key, names in told.items() if names}
    return row if answer.image_fault is None else {**row, "image_fault": answer.image_fault}


def write_predictions(file: Path, rows: Sequence[Prediction]) -> None:
    """Publish a cell's predictions in one step; a file that already says the same is left alone."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not file.is_file() or file.read_bytes() != text.encode():
        write_text_atomic(file, text)


def read_predictions(file: Path) -> list[Prediction]:
    """The rows of a predictions file.

    Raises:
        DeloError: there is no such file, or a line of it is not JSON.
    """
    if not file.is_file():
        raise DeloError("Predictions are missing.", given=file, fix="evaluate this stage again")
    try:
        with file.open(encoding="utf-8") as lines:
            return [_row(line) for line in lines]
    except ValueError as error:
        raise DeloError(
            f"A predictions file is damaged: {error}", given=file, fix="evaluate this stage again"
        ) from error


def _row(line: str) -> Prediction:
    row = parse_json(line)
    if not isinstance(row, dict) or not {"record_id", "task", "prediction"} <= row.keys():
        raise ValueError("a line is no prediction")
    return row
