"""`delo-llava ask`: one question to one stage or to all, from words or a pipe."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import tiny_models
import training_support as support

from delo_eval.harness.ask import Asked, Reply, _choice, _shares, ask, read_asked
from delo_eval.harness.saved import SavedStage
from delo_llava.cli import main
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence

WORDS = ("--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--train.lr=0.05")
QUESTION = "what color is it, question 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeLo after two tasks."""
    folder = tmp_path_factory.mktemp("ask")
    recipe = support.write_sequence(folder)
    words = support.words(recipe, tiny_models.session("llava"), folder / "run", *WORDS)
    run_sequence(make_job(load_config(None, words)), None)
    return folder / "run"


def test_lines_are_text_or_objects_whose_keys_stand_before_what_holds_for_all(tmp_path: Path) -> None:
    lines = ["what?\n", "\n", json.dumps({"question": "why?", "image": "~/a.png", "context": "c"}) + "\n"]
    assert read_asked(lines, tmp_path, None) == [
        Asked("what?", tmp_path), Asked("why?", Path("~/a.png").expanduser(), "c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "no question"),
        (["{broken"], "Line 1 is no JSON object"),
        (["good", '{"question": "x", "picture": "a.png"}'], "Line 2"),
        (['{"image": "a.png"}'], "question"),
        (['{"question": 5}'], "texts only"),
    ],
)
def test_what_is_no_question_is_refused(lines: list[str], told: str) -> None:
    with pytest.raises(DeloError, match=told):
        read_asked(lines, None, None)


def test_likelihoods_become_probabilities_and_a_missing_one_none() -> None:
    shares = _shares({"a": -1000.0, "b": -1000.0 + math.log(3), "c": None})
    assert shares == pytest.approx({"a": 0.25, "b": 0.75})
    reply = Reply("q", "s", "x", "b", shares, {}, (), (), True, 0.0, 0.0)
    assert _choice(reply) == "b 75.0%, a 25.0%"
    assert (
        _choice(Reply("q", "s", "x", "b", {}, {"a": 0.5, "b": 0.9}, (), (), True, 0.0, 0.0))
        == "b 0.900, a 0.500"
    )


def test_every_stage_says_what_it_says_alone(run: Path) -> None:
    image = run.parent / "images" / "red.png"
    found = list(ask(run, ["all"], [Asked(QUESTION, image)], None, 4, "cpu"))
    assert [reply.stage for reply in found] == ["zero-shot", "task0", "task1"]
    for reply in found[1:]:
        with SavedStage(run, reply.stage, device="cpu") as model:
            assert reply.answer == model.answer(QUESTION, image, max_new_tokens=4)
        assert sum(reply.shares.values()) == pytest.approx(1)
        assert reply.task == max(reply.shares, key=lambda task: reply.shares[task])
        assert reply.missing == ["context"]
    assert (found[0].task, found[0].shares) == (None, {})


def test_a_task_that_is_told_is_answered_as(run: Path) -> None:
    (reply,) = ask(run, ["last"], [Asked(QUESTION)], "task0", 4, "cpu")
    assert (reply.task, reply.scores, reply.missing) == ("task0", {}, ["image", "context"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stages", "task7"], "task0"),
        (["--image", "nowhere.png"], "no such picture"),
        (["--task", "task7"], "not trained"),
    ],
)
def test_mistakes_are_told(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["ask", "--run", str(run), "--device=cpu", *words, "what?"])
    assert told in capsys.readouterr().err


def test_tables_for_people_and_lines_for_programs(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ask", "--run", str(run), "--device=cpu", "--stages", "task0,last", "--max_new_tokens", "3"]
    assert main([*words, QUESTION]) == 0
    said = capsys.readouterr().out
    assert f"{QUESTION} (without image and context)" in said
    assert all(word in said for word in ("task0", "task1"))
    pipe = f'{QUESTION}\n{{"question": "why?", "context": "it is red"}}\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(pipe))
    assert main([*words, "--json", "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["stage"], line["question"]) for line in lines] == [
        ("task0", QUESTION), ("task0", "why?"), ("task1", QUESTION), ("task1", "why?"),
    ]  # fmt: skip
    assert [line["missing"] for line in lines[:2]] == [["image", "context"], ["image"]]
