"""`train --dry_run`: shows what a run does and needs, refuses what it would refuse, and writes nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.cli import main_train


@pytest.fixture()
def words(tmp_path: Path) -> list[str]:
    recipe = support.write_sequence(tmp_path / "data")
    return support.words(recipe, tiny_models.session("llava"), tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main_train([*words, "--dry_run"])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_it_shows_stages_questions_memory_and_disk_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    before = files(tmp_path)
    assert main_train([*words, "--dry_run"]) == 0
    assert files(tmp_path) == before and not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    # 16 records of which 0.4 lose a modality (6), half of them each; one step is 8 of them.
    assert re.search(r"1\. task0 *│ *16 │ *\d+ │ *3 │ *3 │ *0 │", out)
    assert re.search(r"task1 *│ *4 │ *(0 │ *1|1 │ *0) │", out)  # of 4 questions one
    for said in (
        "lora on",
        "2 of 2 stages to do",
        "1 rank",
        "memory of a rank",
        "disk: adapters",
        "nothing was",
    ):
        assert said in out


def test_it_finds_the_fault_of_the_last_task(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data" / "task1_train.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    rows[-1]["image"] = "images/gone.png"
    file.write_text(json.dumps(rows))
    said = told([*words, "--missing.ratio=0"], capsys)
    assert "train-15" in said and "gone.png" in said
    assert not (tmp_path / "run").exists()


def test_it_finds_a_batch_that_ranks_cannot_share(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "do not divide" in told([*words, "--train.global_batch=7"], capsys)


def test_a_begun_run_is_gone_on_with_or_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_train([*words, "--train.max_steps=1"]) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert main_train([*words, "--train.max_steps=1", "--dry_run"]) == 0
    assert "0 of 2 stages to do" in capsys.readouterr().out
    assert "train.max_steps: the run has 1, given 2" in told([*words, "--train.max_steps=2"], capsys)
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "run" / "adapters" / "task1")
    assert main_train([*words, "--train.max_steps=1", "--dry_run"]) == 0
    assert "1 of 2 stages to do" in capsys.readouterr().out


def test_a_disk_without_room_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import delo_llava.cluster.dry_run as module

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = told(words, capsys)
    assert "too little room" in said and "--train.keep=1" in said
