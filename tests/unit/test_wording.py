"""One wording in place of every instruction: what is asked, where it goes, and that it never passes for a
run's own results."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_eval.answers.question import Question
from delo_eval.compare.assemble import compare
from delo_eval.harness.folder import Request, open_folder
from delo_eval.harness.questions import Questions, cells_of
from delo_eval.harness.run import main
from delo_eval.harness.stage import evaluate_stage
from delo_eval.matrix.results import WORDED
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence

SAME = "look and answer"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeLo after two tasks, evaluated."""
    folder = tmp_path_factory.mktemp("wording")
    words = support.words(
        support.write_sequence(folder), tiny_models.session("llava"), folder / "run", "--method=delo",
        "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8",
    )  # fmt: skip
    run_sequence(make_job(load_config(None, words)), evaluate_stage)
    return folder / "run"


def _rest(question: Question) -> tuple[Any, ...]:
    record = question.record
    return record.id, record.image, record.context, record.answer, question.presence


def test_every_instruction_is_replaced_and_nothing_else(run: Path) -> None:
    own, worded = (open_folder(run, Request(wording=w)) for w in (None, SAME))
    for cell in cells_of(own.sequence, own.plan, 1, ["run"], needs_task=False):
        before, after = (Questions(folder.config).of(cell) for folder in (own, worded))
        assert {q.record.instruction for q in after} == {SAME}
        assert [_rest(q) for q in after] == [_rest(q) for q in before]
        assert SAME not in {q.record.instruction for q in before}


def test_results_go_to_their_own_folder_and_are_marked(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    assert main(["--run", str(run), "--stage", "all", "--patterns", "run", "--wording", SAME]) == 0
    assert (run / "results.json").read_bytes() == before
    found = json.loads((run / WORDED / "results.json").read_text())
    assert (found["wording"], json.loads(before)["wording"]) == (SAME, None)
    assert found["passport"]["asked"] != json.loads(before)["passport"]["asked"]
    with pytest.raises(DeloError, match="wording"):
        compare([run, run / WORDED])
    with pytest.raises(DeloError, match="another wording"):
        main(["--run", str(run), "--stage", "0", "--wording", "other words"])
