"""A run that answers by itself says what its evaluation says, and its adapters say which base they need."""

import json
from pathlib import Path

import pytest
import tiny_models
import training_support as support
from run_support import predictions

from delo_eval.harness.questions import Questions, cells_of
from delo_eval.harness.saved import SavedStage
from delo_eval.harness.stage import evaluate_stage
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence

DELO = ("--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--missing.ratio=0.5")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeLo after two tasks, evaluated."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = support.write_sequence(folder)
    words = support.words(recipe, tiny_models.session("llava"), folder / "run", *DELO, "--train.lr=0.05")
    run_sequence(make_job(load_config(None, words)), None)
    evaluate_stage(folder / "run", 1)
    return folder / "run"


def test_one_question_at_a_time_gets_the_answers_of_the_evaluation(run: Path) -> None:
    """Its task is chosen and its forward routed without a word from the caller."""
    rows, said = predictions(run, 1), set[str]()
    with SavedStage(run, device="cpu") as model:
        cells = cells_of(model.run.sequence, model.run.plan, 1, ["run"], needs_task=False)
        assert len(cells) == 2
        for cell in cells:
            expected = {row["record_id"]: row["prediction"] for row in rows[cell.task.name]}
            for question in Questions(model.run.config).of(cell):
                record, (image, context) = question.record, question.presence
                text = model.answer(
                    record.instruction, record.image if image else None,
                    record.context if context else None, cell.task.max_new_tokens,
                )  # fmt: skip
                assert text == expected[record.id]
                said.add(text)
    assert len(said) > 1, "one word for everything would agree trivially"


def test_a_told_task_answers_and_bad_ones_are_refused(run: Path) -> None:
    rows = predictions(run, 1)["task1"]
    with SavedStage(str(run), stage="last", task="task1", device="cpu") as model:
        cells = cells_of(model.run.sequence, model.run.plan, 1, ["run"], needs_task=True)
        questions = Questions(model.run.config).of(next(c for c in cells if c.task.name == "task1"))
        assert model.answers(questions, 8)[: len(rows)] == [row["oracle_prediction"] for row in rows]
    with pytest.raises(DeloError, match=r"not trained on that task(.|\n)*task1(.|\n)*task0"):
        SavedStage(run, stage=0, task="task1")
    with pytest.raises(DeloError, match=r"One stage(.|\n)*all"):
        SavedStage(run, stage="all")


def test_adapters_carry_the_fingerprint_of_their_base(run: Path) -> None:
    known = json.loads((run / "run.json").read_text())["base"]["sha256"]
    carried = [json.loads((run / "adapters" / task / "base.json").read_text()) for task in ("task0", "task1")]
    assert carried == 2 * [{"name": tiny_models.session("llava").name, "sha256": known}] and len(known) == 64
