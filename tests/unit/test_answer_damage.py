"""Stored answers, predictions and memories of hashes that were damaged are dropped, named and made again."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from answer_support import (  # noqa: F401
    STAGE,
    answers_of,
    batches_asked,
    counts,
    evaluated,
    model_refused,
    outcome,
    own_copy,
)
from run_support import little_recipe  # noqa: F401

from delo_eval.harness.stage import evaluate_stage


def damage(file: Path, line: int) -> None:
    """Turn one letter of a line into another."""
    lines = file.read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b"prediction", b"predictioN", 1)
    file.write_bytes(b"\n".join(lines))


def test_only_a_damaged_answer_is_given_again(
    run: Path, asked: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    before, file = outcome(run), answers_of(run)
    whole = file.read_bytes()
    damage(file, 3)
    (run / "answers" / "1.json").unlink()
    with caplog.at_level(logging.WARNING):
        evaluate_stage(run, STAGE)
    assert [str(m) for m in caplog.messages] == [
        f"A stored answer is damaged and is given again: {file}, line 4"
    ]
    assert counts(run) == {"stored": 26, "new": 1} and len(asked) == 1
    assert outcome(run) == before and file.read_bytes() == whole


def test_a_cut_file_of_answers_is_completed(run: Path, asked: list[int]) -> None:
    before, file = outcome(run), answers_of(run)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    (run / "answers" / "1.json").unlink()
    evaluate_stage(run, STAGE)
    assert outcome(run) == before and file.read_bytes() == whole and 0 < counts(run)["new"] < 9


def test_damaged_predictions_are_named_and_written_again(
    run: Path, no_model: None, caplog: pytest.LogCaptureFixture
) -> None:
    before, file = outcome(run), run / "predictions" / "1" / "run" / "places.jsonl"
    damage(file, 2)
    with caplog.at_level(logging.WARNING):
        evaluate_stage(run, STAGE)
    assert str(file) in caplog.text and outcome(run) == before


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["hashes.json", ".hashes.part1"])
def test_damaged_memories_of_hashes_are_dropped(
    run: Path, no_model: None, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    before, whole = outcome(run), (run / "answers" / "hashes.json").read_bytes()
    (run / "answers" / name).write_bytes(content)
    (run / "answers" / "1.json").unlink()
    with caplog.at_level(logging.WARNING):
        evaluate_stage(run, STAGE)
    assert "files are hashed again" in caplog.text and counts(run)["new"] == 0
    assert outcome(run) == before and (run / "answers" / "hashes.json").read_bytes() == whole
    assert not (run / "answers" / ".hashes.part1").exists()


@pytest.mark.parametrize("cut", [slice(0, 2), slice(0, 0), slice(1, 3)])
def test_damaged_entries_of_the_memory_are_dropped(run: Path, no_model: None, cut: slice) -> None:
    before, file = outcome(run), run / "answers" / "hashes.json"
    whole = file.read_bytes()
    file.write_text(json.dumps({name: entry[cut] for name, entry in json.loads(whole).items()}))
    (run / "answers" / "1.json").unlink()
    evaluate_stage(run, STAGE)
    assert outcome(run) == before and counts(run)["new"] == 0 and file.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[]", lambda text: "null", lambda text: text[:40], lambda text: "[" * 100_000,
        lambda text: json.dumps({"schema": json.loads(text)["schema"]}),
        lambda text: json.dumps({**json.loads(text), "modules": None}),
        lambda text: json.dumps({**json.loads(text), "modules": [3, "nobodys.plugin"]}),
        lambda text: json.dumps({**json.loads(text), "files": []}),
    ],
)  # fmt: skip
def test_a_receipt_that_cannot_be_used_is_written_again(
    run: Path, no_model: None, damage: Callable[[str], str]
) -> None:
    before, file = outcome(run), run / "answers" / "1.json"
    whole = file.read_text()
    file.write_text(damage(whole))
    evaluate_stage(run, STAGE)
    assert outcome(run) == before and file.read_text() == whole and counts(run)["new"] == 0
