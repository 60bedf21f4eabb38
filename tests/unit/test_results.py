"""results.json: schema and documentation, what it derives and refuses; predictions, tables and plots."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from delo_eval.answers.predictions import prediction_of, read_predictions, write_predictions
from delo_eval.answers.question import Answer, Question
from delo_eval.harness.closing import fill_cell
from delo_eval.matrix.accuracy import ZERO_SHOT, AccuracyMatrix
from delo_eval.matrix.derived import choice_statistics, summarise
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.plots import draw
from delo_eval.matrix.results import (
    FILE,
    SCHEMA,
    Results,
    read_results,
    results_json,
    resume_results,
    write_results,
)
from delo_eval.matrix.table import final_table, stage_table
from delo_eval.scorers.base import Reference
from delo_eval.scorers.exact_match import SCORER
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError
from delo_llava.tasks import Record

TASKS = ("science", "ocr", "naming")
DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"
FACTS: dict[str, Any] = {
    "scorer_ids": dict.fromkeys(TASKS, "exact_match.v1"),
    "world": 2,
    "zero": "2",
    "passport": {"id": "0" * 12, "files": "f" * 12},
    "start_weights": {"name": "mini-llava", "sha256": "0" * 64},
    "data_hashes": {},
    "versions": {"torch": "2"},
    "changes": [],
    "trainable_parameters_per_task": dict.fromkeys(TASKS, 1000),
    "train_seconds": [1.0, 2.0, None],
    "missing_train": {},
}
HAND = [[80.0, 12.0, None], [70.0, 90.0, 33.0], [74.0, 60.0, 50.0]]


def results(stages: int = 3, *, choice: bool = True) -> Results:
    """A run of three tasks with a zero-shot row, evaluated after its first `stages` stages."""
    matrix = AccuracyMatrix(Plan.one_each(TASKS))
    for task, score in zip(TASKS, (5.0, 10.0, 30.0), strict=True):
        matrix.set("matched", ZERO_SHOT, task, score, count=50)
    for stage, row in enumerate(HAND[:stages]):
        for j, (task, score) in enumerate(zip(TASKS, row, strict=True)):
            if score is not None:
                matrix.set("matched", stage, task, score, count=50)
            if j <= stage:
                matrix.set("oracle", stage, task, 95.0, count=50)
    found = Results(matrix, eval_seconds={ZERO_SHOT: 1.5, **{stage: 2.0 + stage for stage in range(stages)}})
    for stage in range(stages if choice else 0):
        found.note_choice(stage, "run", choice_statistics(choices(stage), TASKS))
    return found


def choices(stage: int) -> list[dict[str, Any]]:
    """Four records of each trained task; of the last, one is taken for the first."""
    names = TASKS[: stage + 1]
    rows = [
        {"task": t, "task_used": t, "task_without_instruction": TASKS[0]} for t in names for _ in range(4)
    ]
    rows[-1]["task_used"] = TASKS[0]
    return rows


def content(stages: int = 3, **options: Any) -> dict[str, Any]:
    return results_json(results(stages, **options), RunConfig(method="delo"), FACTS)


def test_the_promised_fields() -> None:
    found = json.loads(json.dumps(content(), allow_nan=False))
    assert found["schema"] == SCHEMA == "delo-llava/results/1"
    assert found["method"] == "delo" and found["tasks"] == list(TASKS)
    assert found["matrix"]["matched"] == HAND
    assert found["matrix"]["oracle"] == [[95.0, None, None], [95.0, 95.0, None], [95.0, 95.0, 95.0]]
    for mode in ("matched", "oracle"):
        assert {"ap", "forgetting", "forgetting_max", "maa", "mft", "bwt_T", "bwt_Tm1", "fwt"} <= set(
            found["metrics"][mode]
        )
    assert found["metrics"]["matched"]["ap"] == pytest.approx(184 / 3)
    assert found["metrics"]["matched"]["forgetting"] == pytest.approx(18)
    assert found["metrics"]["matched"]["fwt"] == pytest.approx(2.5)
    assert found["metrics"]["oracle"]["forgetting"] == 0 and found["metrics"]["oracle"]["fwt"] is None
    assert found["metrics"]["complete"] is True
    assert found["zero_shot"] == {"run": [5.0, 10.0, 30.0]}
    assert found["seconds"] == {
        "train": [1.0, 2.0, None], "eval": [2.0, 3.0, 4.0], "zero_shot": 1.5, "answers": {},
    }  # fmt: skip
    assert found["bad_images"] == {}
    assert found["metric_ids"]["bwt_T"] == "bwt_T.v1" and found["scorer_ids"]["ocr"] == "exact_match.v1"
    assert found["missing"]["spec"] == {"ratio": 0.0, "kind": "both", "seed": 0, "image": "absent"}
    assert found["trainable_parameters_per_task"]["ocr"] == 1000


def test_task_choice_is_that_of_the_latest_stage() -> None:
    found = content()
    assert found["task_choice_accuracy"] == pytest.approx(100 * 11 / 12)
    assert found["task_choice_accuracy_without_instruction"] == pytest.approx(100 * 4 / 12)
    latest = found["task_choice"]["2"]["run"]
    assert latest["confusion"] == [[4, 0, 0], [0, 4, 0], [1, 0, 3]]
    assert latest["confusion_without_instruction"] == [[4, 0, 0]] * 3
    assert (
        content(choice=False)["task_choice"] is None and content(choice=False)["task_choice_accuracy"] is None
    )


def test_every_key_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = content()
    keys = [
        *found,
        *(f"matrix.{k}" for k in found["matrix"]),
        *found["metrics"]["matched"],
        *latest_choice_keys(found),
    ]
    assert [key for key in keys if f"`{key}`" not in text] == []
    assert SCHEMA in text


def latest_choice_keys(found: dict[str, Any]) -> list[str]:
    return list(found["task_choice"]["2"]["run"])


def test_a_running_sequence_is_scored_on_its_finished_square_and_says_so() -> None:
    found = content(stages=2)["metrics"]
    assert found["stages"] == {"matched": 2, "oracle": 2} and found["complete"] is False
    assert found["matched"]["ap"] == pytest.approx(80) and found["matched"]["forgetting"] == pytest.approx(10)
    assert found["matched"]["fwt"] == pytest.approx(2)
    assert set(summarise(AccuracyMatrix(Plan.one_each(TASKS)))["matched"].values()) == {None}


def test_written_results_are_resumed_cell_for_cell(tmp_path: Path) -> None:
    first, config = results(2), RunConfig(method="delo")
    write_results(tmp_path, results_json(first, config, FACTS))
    assert resume_results(tmp_path, config, Plan.one_each(TASKS)) == first
    assert not list(tmp_path.glob(".*"))


def test_results_of_other_runs_and_schemas_are_refused(tmp_path: Path) -> None:
    config = RunConfig(method="delo")
    write_results(tmp_path, content())
    with pytest.raises(DeloError, match="another method"):
        resume_results(tmp_path, config.model_copy(update={"method": "lora"}), Plan.one_each(TASKS))
    with pytest.raises(DeloError, match="another tasks"):
        resume_results(tmp_path, config, Plan.one_each(TASKS[::-1]))
    val = config.eval.model_copy(update={"split": "val"})
    with pytest.raises(DeloError, match="another split"):
        resume_results(tmp_path, config.model_copy(update={"eval": val}), Plan.one_each(TASKS))
    write_results(tmp_path, {**content(), "schema": "delo-llava/results/0"})
    with pytest.raises(DeloError, match="another schema"):
        read_results(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DeloError, match="cannot be read"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path, {"schema": SCHEMA, "score": float("nan")})


def question(name: str) -> Question:
    return Question(Record(name, "ocr", "test", None, None, "which word ?", "MANGO"), (False, True))


def rows(*names: str) -> list[dict[str, Any]]:
    said = Answer("mango\u2028.", "mango", "naming", "ocr", {"ocr": 0.25, "naming": 0.75})
    return [prediction_of(question(name), said, SCORER, 1, "run") for name in names]


def test_a_prediction_line_says_all() -> None:
    assert rows("x")[0] == {
        "record_id": "x",
        "task": "ocr",
        "stage": 1,
        "pattern": "run",
        "presence": {"image": False, "text": True},
        "answer": "MANGO",
        "prediction": "mango\u2028.",
        "score": 1.0,
        "follows": None,
        "oracle_prediction": "mango",
        "oracle_score": 1.0,
        "oracle_follows": None,
        "task_used": "naming",
        "task_without_instruction": "ocr",
        "choice_scores": {"ocr": 0.25, "naming": 0.75},
    }


def test_predictions_are_published_once_and_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "predictions" / "1" / "run" / "ocr.jsonl"
    write_predictions(file, rows("c", "a"))
    assert read_predictions(file) == rows("c", "a")
    before = file.stat().st_mtime_ns
    write_predictions(file, rows("c", "a"))
    assert file.stat().st_mtime_ns == before
    file.write_text('{"record_id": "a"')
    with pytest.raises(DeloError, match="damaged"):
        read_predictions(file)
    file.unlink()
    with pytest.raises(DeloError, match="missing"):
        read_predictions(file)


def test_a_plan_of_other_tasks_is_named_as_damage(tmp_path: Path) -> None:
    content = results_json(results(2), RunConfig(method="delo"), FACTS)
    write_results(tmp_path, content | {"tasks": ["x", "y", "z"]})
    with pytest.raises(DeloError, match="damaged.*none of its tasks"):
        read_results(tmp_path)


def test_a_record_whose_image_cannot_be_used_counts_as_wrong() -> None:
    said = Answer("", "", image_fault="broken")
    row = prediction_of(question("x"), said, SCORER, 1, "run")
    assert row["score"] == 0 and row["oracle_score"] == 0 and row["image_fault"] == "broken"


def test_tables() -> None:
    console = Console(width=200, record=True)
    console.print(stage_table(content(), 1))
    console.print(stage_table(content(), ZERO_SHOT))
    console.print(final_table(content(stages=2)))
    text = console.export_text()
    assert "after 2. ocr" in text and "33.00·" in text and "80.00" in text
    assert "zero-shot" in text and "2 of 3 stages" in text


def test_plots_are_written_for_finished_and_running_sequences(tmp_path: Path) -> None:
    for stages in (1, 3):
        written = draw(content(stages=stages), tmp_path / str(stages))
        assert [path.name for path in written] == ["heatmap.png", "forgetting.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert draw(content(stages=0), tmp_path / "none") == []


def test_a_prediction_line_says_whether_the_instruction_is_followed() -> None:
    asked = Record("x", "ocr", "test", None, None, "Is it red? Answer with yes or no.", "yes")
    said = Answer("a long story", "Yes.", "naming", "ocr", None)
    row = prediction_of(Question(asked, (False, False)), said, SCORER, 1, "run")
    assert (row["follows"], row["oracle_follows"]) == (False, True)
    alone = prediction_of(
        Question(asked, (False, False)), Answer("no", None, None, None, None), SCORER, 1, "run"
    )
    assert (alone["follows"], alone["oracle_follows"]) == (True, None)


def test_a_cell_has_its_error_its_format_share_and_the_price_of_choosing() -> None:
    found = Results(AccuracyMatrix(Plan.one_each(("ocr",))), {"0": {"run": {}}})
    right, told = [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    lines = [
        {
            "prediction": "", "oracle_prediction": "", "score": score, "oracle_score": oracle,
            "follows": follows, "oracle_follows": None,
        }
        for score, oracle, follows in zip(right, told, [True, True, True, False], strict=True)
    ]  # fmt: skip
    cell: Any = SimpleNamespace(task=SimpleNamespace(name="ocr"), pattern="run")
    method: Any = SimpleNamespace(capabilities=SimpleNamespace(needs_task=False))
    fill_cell(found, method, 0, cell, lines, SCORER, [Reference(str(i), "") for i in range(4)])
    content = results_json(found, RunConfig(method="delo"), FACTS)
    assert content["matrix"] == {"matched": [[50.0]], "oracle": [[75.0]]}
    errors = content["standard_errors"]["run"]
    assert errors["matched"][0][0] == pytest.approx(100 * (0.25 / 3) ** 0.5)
    assert errors["oracle"][0][0] == pytest.approx(100 * (0.75 * 0.25 / 3) ** 0.5)
    assert content["instruction_following"]["run"] == {
        "matched": [[75.0]], "oracle": [[None]], "zero_shot": [None],
    }  # fmt: skip
    assert content["oracle_gap"] == {"ocr": 25.0}
