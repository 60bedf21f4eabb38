"""What a launch must share with the run that it goes on with: what was used, not what is to come."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.runs.identity import base_differences, base_facts
from delo_llava.runs.job import Job, make_job
from delo_llava.runs.record import ZERO_SHOT, open_run
from delo_llava.runs.store import RunStore


@pytest.fixture
def place(tmp_path: Path) -> Path:
    support.write_sequence(tmp_path)
    shutil.copytree(tiny_models.session("llava"), tmp_path / "model")
    return tmp_path


def job(place: Path, *more: str) -> Job:
    words = support.words(place / "tiny.yaml", place / "model", place / "run", *more)
    return make_job(load_config(None, words))


def opened(place: Path, *more: str) -> dict[str, Any]:
    store = RunStore(place / "run")
    open_run(store, job(place, *more))
    return store.read_run()


def begin(place: Path, *stages: str) -> RunStore:
    """A run whose given stages are published."""
    opened(place)
    store = RunStore(place / "run")
    store.update_run(**{ZERO_SHOT: True})
    for stage in stages:
        store.adapter(stage).mkdir()
    return store


def change(file: Path) -> None:
    rows = json.loads(file.read_text())
    rows[0]["conversations"][1]["value"] = "another answer"
    file.write_text(json.dumps(rows))


def test_a_folder_in_which_nothing_was_trained_is_free(place: Path) -> None:
    store = begin(place)
    store.results.write_text("{}")
    assert opened(place)[ZERO_SHOT] and store.results.exists(), "the same run keeps the base's answers"
    change(place / "task0_train.json")
    found = opened(place, "--train.lr=0.5", "--method=individual")
    assert ZERO_SHOT not in found and not store.results.exists() and found["changes"] == []


def test_a_stage_with_a_checkpoint_is_begun(place: Path) -> None:
    store = begin(place)
    (store.step_checkpoints("task0") / "step-4").mkdir(parents=True)
    with pytest.raises(DeloError, match=r"train.lr: the run has 0\.01, given 0\.5"):
        opened(place, "--train.lr=0.5")


@pytest.mark.parametrize("file", ["task0_train.json", "task0_test.json"])
def test_files_of_stages_that_were_begun_must_be_the_same(place: Path, file: str) -> None:
    begin(place, "task0")
    change(place / file)
    with pytest.raises(DeloError, match=rf"data {file.removesuffix('.json').replace('_', '.')}: the run has"):
        opened(place)


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_of_stages_to_come_may_be_mended_and_that_is_recorded(place: Path, split: str) -> None:
    store = begin(place, "task0")
    before = store.read_run()["data_hashes"]["task1"][split]
    change(place / f"task1_{split}.json")
    found = opened(place)
    (entry,) = found["changes"]
    assert entry["after"] == ["task0"] and entry["key"] == f"data task1.{split}"
    assert entry["from"] == before and entry["to"] == found["data_hashes"]["task1"][split] != before
    assert not found[ZERO_SHOT], "the base is evaluated again on what is new"
    assert opened(place)["changes"] == [entry], "recorded once"


@pytest.mark.parametrize("word", ["--train.micro_batch=4", "--zero=2", "--train.gradient_checkpointing=true"])
def test_how_later_stages_are_computed_may_change_and_is_recorded(place: Path, word: str) -> None:
    begin(place, "task0")
    changes = opened(place, word)["changes"]
    assert [change["key"] for change in changes] == [word.removeprefix("--").partition("=")[0]]


@pytest.mark.parametrize("word", ["--train.lr=0.5", "--missing.ratio=0.1", "--quant=nf4", "--seed=9"])
def test_what_is_computed_may_not_change(place: Path, word: str) -> None:
    begin(place, "task0")
    with pytest.raises(DeloError, match=word.removeprefix("--").partition("=")[0]):
        opened(place, word)


def test_settings_of_tasks_to_come_may_change(place: Path) -> None:
    begin(place, "task0")
    assert [c["key"] for c in opened(place, "--per_task.task1.lr=0.5")["changes"]] == ["per_task.task1.lr"]
    with pytest.raises(DeloError, match=r"per_task\.task0\.lr"):
        opened(place, "--per_task.task0.lr=0.5", "--per_task.task1.lr=0.5")


def test_data_and_base_may_move(place: Path) -> None:
    begin(place, "task0")
    (place / "model").rename(place / "elsewhere")
    found = opened(place, f"--model={place / 'elsewhere'}")
    assert found["base"]["path"] == str(place / "elsewhere") and found["changes"] == []


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_every_file_of_the_base_counts(place: Path, file: str) -> None:
    begin(place, "task0")
    target = place / "model" / file
    data = bytearray(target.read_bytes())
    data[-2] ^= 1
    target.write_bytes(bytes(data))
    name = "weights" if file.endswith("safetensors") else file
    with pytest.raises(DeloError, match=f"base {name}: the run has"):
        opened(place)


def test_what_an_older_run_did_not_record_is_not_compared(place: Path) -> None:
    found = base_facts(RunStore(place / "run"), str(place / "model"))
    assert base_differences({"path": "x", "sha256": found["sha256"]}, found) == []
    assert base_differences({}, found) == []
    added = found | {"files": found["files"] | {"chat_template.jinja": "1"}}
    assert base_differences(found, added) == [
        f"base chat_template.jinja: the run has none, {found['path']} has 1"
    ]
