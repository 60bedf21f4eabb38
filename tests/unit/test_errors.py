"""Kinds of wrong answers, confusions, and the files and tables made of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_support import outcomes, write_run

from delo_eval.answers.errors import KINDS, form, kind_of, number, plain, run_errors, task_errors
from delo_eval.cli import main
from delo_llava.errors import DeloError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "letter"), ("(b)", "word"), ("C.", "letter"), ("12", "number"), ("-3.5", "number"),
        ("1,000", "number"), ("two", "number"), ("Yes", "yes/no"), ("no.", "yes/no"), ("red", "word"),
        ("a red car", "phrase"), ("red, blue", "list"), ("[0.1, 0.2, 0.3, 0.4]", "box"),
        ("the man in the photo holds a big bat", "sentence"), ("", "none"), ("?!", "none"),
    ],
)  # fmt: skip
def test_forms(text: str, expected: str) -> None:
    assert form(text) == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "forms", "kind"),
    [
        ("red", "  ", ["word"], "empty"),
        ("Red", "the red!", ["word"], "case_or_punctuation"),
        ("T-shirt", "t shirt", ["word"], "case_or_punctuation"),
        ("red", "Unanswerable", ["word"], "false_unanswerable"),
        ("unanswerable", "red", ["word"], "missed_unanswerable"),
        ("3", "4", ["number"], "off_by_one"),
        ("three", "2", ["number"], "off_by_one"),
        ("3", "5", ["number"], "other_answer"),
        ("B", "The answer is B.", ["letter"], "contains_answer"),
        ("fire truck", "truck", ["phrase", "word"], "part_of_answer"),
        ("art", "cart", ["word"], "other_answer"),
        ("B", "I do not know that", ["letter"], "wrong_format"),
        ("yes", "blue", ["yes/no"], "wrong_format"),
        ("yes", "no", ["yes/no"], "other_answer"),
    ],
)
def test_kinds(answer: str, prediction: str, forms: list[str], kind: str) -> None:
    assert kind_of(answer, prediction, forms) == kind


def row(i: int, answer: str, prediction: str, score: float, **more: Any) -> dict[str, Any]:
    both = {"oracle_prediction": prediction, "oracle_score": score}
    return {
        "record_id": f"r{i}",
        "task": "t",
        "answer": answer,
        "prediction": prediction,
        "score": score,
        **both,
        **more,
    }


def test_kinds_add_up_to_the_wrong_answers_and_confusions_are_counted() -> None:
    rows = [row(i, "cat", "cat", 1.0) for i in range(4)]
    rows += [row(10 + i, "cat", "Dog.", 0.0) for i in range(3)] + [row(20, "dog", "cat", 0.0)]
    rows += [row(30, "cat", "", 0.0), row(31, "cat", "a long story about many animals here", 0.0)]
    rows += [row(32, "cat", "dog", 0.6)]  # most humans agreed: not wrong
    found = task_errors("naming", rows)
    assert (found.records, found.wrong, sum(found.kinds.values())) == (11, 6, 6)
    assert found.kinds["other_answer"] == 4 and found.kinds["empty"] == 1 and found.kinds["wrong_format"] == 1
    assert [(c.answer, c.prediction, c.count) for c in found.confusions] == [
        ("cat", "dog", 3),
        ("dog", "cat", 1),
    ]
    assert found.examples["other_answer"] == ["r10", "r11", "r12", "r20"] and found.forms == {"word": 11}
    assert list(found.kinds) == list(KINDS)


def test_the_told_task_s_answers_are_judged_on_request() -> None:
    rows = [row(0, "cat", "dog", 0.0, oracle_prediction="cat", oracle_score=1.0)]
    assert task_errors("t", rows).wrong == 1 and task_errors("t", rows, oracle=True).wrong == 0


def test_numbers_and_plain_words() -> None:
    assert number("ten") == 10 and number("1,250") == 1250 and number("50%") == 50
    assert number("1.2.3") is None and number("many") is None
    assert plain("The  T-Shirt!") == "t shirt" and plain("A") == "a" and plain("-3.5") == "-3.5"


def test_command_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "x", outcomes((0.75, 0.5)))
    assert main(["errors", "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "science: yes → no ×10" in shown and "ocr: yes → no ×20" in shown
    content = json.loads((run / "errors.json").read_text())
    assert content["stage"] == 1 and content["mode"] == "matched"
    assert [task["wrong"] for task in content["tasks"]] == [10, 20]
    assert main(["errors", "--run", str(run), "--stage", "0", "--output", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["tasks"][0]["wrong"] == 0
    assert main(["errors", "--run", str(run), "--stage", "science"]) == 0
    assert "after 1. science" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["errors", "--run", str(run), "--stage", "2"])
    assert "This stage is not evaluated" in capsys.readouterr().err


def test_predictions_that_are_missing_or_not_of_this_mode_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", outcomes((0.75, 0.5)))
    with pytest.raises(DeloError, match="missing"):
        run_errors(run, 1, ["science"], pattern="image")
    file = run / "predictions" / "1" / "run" / "ocr.jsonl"
    file.write_text(json.dumps(row(0, "a", "b", 0.0, oracle_score=None)) + "\n")
    with pytest.raises(DeloError, match="true task"):
        run_errors(run, 1, ["ocr"], oracle=True)
    assert run_errors(run, 1, ["ocr"])[0].wrong == 1
