"""How well words alone tell the task: the classifier against its formula, its views, the command."""

import json
import math
from pathlib import Path

import pytest
import training_support as support

from delo_llava.cli import main
from delo_llava.data.recipe import load_sequence
from delo_llava.data_tools.leak import Words, leaks, words_of
from delo_llava.errors import DeloError


def rewrite(folder: Path, task: int, instruction: str, context: str = "") -> None:
    """Other words for every record of a task."""
    for split in ("train", "test"):
        file = folder / f"task{task}_{split}.json"
        rows = json.loads(file.read_text())
        for row in rows:
            row["conversations"][0]["value"] = f"<image>\n{instruction}"
            row["context"] = context
        file.write_text(json.dumps(rows))


def test_the_likelihoods_are_those_of_the_formula() -> None:
    model = Words({"a": ["x x y"], "b": ["y z", "Z!"]})
    assert list(model.vocabulary) == ["x", "y", "z"]
    expected = [[3 / 6, 2 / 6, 1 / 6], [1 / 6, 2 / 6, 3 / 6]]  # counts and one, over words and vocabulary
    for row, shares in zip(model.likelihood, expected, strict=True):
        assert row.tolist() == pytest.approx([math.log(share) for share in shares])
    assert [model.choose(text) for text in ("x", "z y", "y", "never seen")] == ["a", "b", "a", "a"]
    assert (model.telling("a"), model.telling("b")) == (["x"], ["z"])
    assert words_of("Été, 2nd—x_y!") == ["été", "2nd", "x", "y"]


def test_tasks_of_one_wording_are_at_chance_and_of_two_are_told_apart(tmp_path: Path) -> None:
    recipe = support.write_sequence(tmp_path)
    for task in (0, 1):
        rewrite(tmp_path, task, "look and answer")
    (instruction, first) = leaks(load_sequence(str(recipe), tmp_path))  # nobody has a context
    assert (instruction.view, first.view) == ("instruction", "first word of the instruction")
    assert (instruction.mean, instruction.chance) == (50.0, 50.0)
    assert instruction.telling == {"task0": [], "task1": []}
    rewrite(tmp_path, 0, "look which colour", "red here")
    rewrite(tmp_path, 1, "look which shape", "round here")
    views = {leak.view: leak for leak in leaks(load_sequence(str(recipe), tmp_path))}
    assert views["instruction"].right == {"task0": 100.0, "task1": 100.0}
    assert views["instruction"].telling == {"task0": ["colour"], "task1": ["shape"]}
    assert views["first word of the instruction"].mean == 50.0
    assert views["context"].mean == 100.0 and views["context"].asked == {"task0": 4, "task1": 4}


def test_one_task_is_refused(tmp_path: Path) -> None:
    recipe = support.write_sequence(tmp_path, tasks=1)
    with pytest.raises(DeloError, match="cannot be mistaken"):
        leaks(load_sequence(str(recipe), tmp_path))


def test_the_command_shows_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = support.write_sequence(tmp_path)
    file = tmp_path / "leak.json"
    assert main(["data", "leak", str(recipe), "--root", str(tmp_path), "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "chance" in out and "50.0" in out
    found = json.loads(file.read_text())
    assert found["schema"] == "delo-llava/leak/1"
    # `question 0` and `question 1` tell the two tasks; their first word is the same.
    assert [(v["view"], v["mean"]) for v in found["views"][:2]] == [
        ("instruction", 100.0), ("first word of the instruction", 50.0),
    ]  # fmt: skip
