"""Predictions on disk: every rank writes parts, rank 0 merges them and counts them against the questions.

`predictions/<stage>/<pattern>/<task>.jsonl`, one object a line; stage is the index from 0, or `zero_shot`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from delo_eval.generate import Answer, Question
from delo_eval.matrix import ZERO_SHOT
from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.mif import obeys
from delo_llava.checkpoint.manifest import write_text_atomic
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json

Row = dict[str, Any]


def prediction_file(output: Path, stage: int, pattern: str, task: str) -> Path:
    """Where the predictions of one cell lie."""
    return (
        output
        / "predictions"
        / ("zero_shot" if stage == ZERO_SHOT else str(stage))
        / pattern
        / f"{task}.jsonl"
    )


def prediction_row(question: Question, answer: Answer, scorer: Scorer, stage: int, pattern: str) -> Row:
    """One line: the question, what was visible, what was said, its score, and how the task was chosen."""
    record, (image, text) = question.record, question.presence
    oracle, reference = answer.oracle, Reference.of(record)
    return {
        "record_id": record.id,
        "task": record.task,
        "stage": stage,
        "pattern": pattern,
        "presence": {"image": image, "text": text},
        "answer": record.answer,
        "prediction": answer.prediction,
        "score": scorer(answer.prediction, reference),
        "follows": obeys(answer.prediction, reference),
        "oracle_prediction": oracle,
        "oracle_score": None if oracle is None else scorer(oracle, reference),
        "oracle_follows": None if oracle is None else obeys(oracle, reference),
        "task_used": answer.task_used,
        "task_without_instruction": answer.task_without_instruction,
        "choice_scores": answer.choice_scores,
    }


def part_file(file: Path, rank: int) -> Path:
    """The share of `file` that `rank` writes."""
    return file.with_name(f".{file.stem}.part{rank}")


def write_part(file: Path, rank: int, batches: Iterable[Sequence[Row]]) -> None:
    """Write one rank's rows batch by batch, so that an interrupted evaluation shows how far it came."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with part_file(file, rank).open("w", encoding="utf-8") as handle:
        for rows in batches:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            handle.flush()


def merge_parts(file: Path, questions: Sequence[Question], world: int) -> list[Row]:
    """Join the parts of all ranks in the order of the questions and publish `file` in one step.

    Raises:
        DeloError: a part is missing, or the rows are not exactly one for each question.
    """
    rows = [row for rank in range(world) for row in read_rows(part_file(file, rank))]
    asked, answered = Counter(q.record.id for q in questions), Counter(row["record_id"] for row in rows)
    if asked != answered:
        lacking, surplus = sorted((asked - answered).elements()), sorted((answered - asked).elements())
        raise DeloError(
            f"{len(rows)} predictions for {len(questions)} questions in {file}: "
            f"without prediction {lacking[:5]}, unasked or repeated {surplus[:5]}.",
            fix="evaluate this stage again",
        )
    place = {question.record.id: i for i, question in enumerate(questions)}
    rows.sort(key=lambda row: place[row["record_id"]])
    write_text_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for part in file.parent.glob(f".{file.stem}.part*"):
        part.unlink()
    return rows


def read_rows(file: Path) -> list[Row]:
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


def _row(line: str) -> Row:
    row = parse_json(line)
    if not isinstance(row, dict) or not {"record_id", "task", "prediction"} <= row.keys():
        raise ValueError("a line is no prediction")
    return row
