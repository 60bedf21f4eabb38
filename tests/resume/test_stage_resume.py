"""SIGKILL, then the same command: it goes on after the last finished stage and ends in the same bits."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.cli import resolve
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence
from delo_llava.runs.stage import StageTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    support.write_sequence(folder)
    return folder


def command(place: Path, name: str, *more: str) -> list[str]:
    return support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, "--train.epochs=1", *more
    )


def train(place: Path, name: str, *more: str) -> Path:
    def evaluate(run: Path, stage: int) -> None:
        with (run / "evaluated.txt").open("a") as file:
            file.write(f"{stage}\n")

    run_sequence(make_job(resolve(command(place, name, *more))), evaluate)
    return place / name


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, "whole")


def copied(place: Path, whole: Path, name: str) -> Path:
    """A finished run under another name, to be damaged."""
    return Path(shutil.copytree(whole, place / name))


@pytest.mark.parametrize("kill", [{"stage": 0, "step": 1}, {"stage": 1, "step": 0}], ids=["first", "second"])
def test_killed_within_a_stage(place: Path, whole: Path, kill: dict[str, int]) -> None:
    name = f"killed{kill['stage']}"
    job: dict[str, Any] = {"words": command(place, name), "kill": kill}
    assert support.launch([job], place) == [-signal.SIGKILL]
    output = place / name
    assert not (output / "complete.json").exists()
    assert len(list((output / "adapters").glob("task*"))) == kill["stage"], (
        "only finished stages are published"
    )
    train(place, name)
    assert support.bits(output) == support.bits(whole)
    assert (output / "complete.json").exists()
    assert [curve(e) for e in support.metrics(output)] == [curve(e) for e in support.metrics(whole)]
    assert (output / "evaluated.txt").read_text().split() == ["-1", "0", "1"], "no stage is evaluated twice"


def test_killed_while_publishing(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is complete but not renamed, and a second one was renamed but not yet noted in run.json."""
    output = copied(place, whole, "publishing")
    (output / "adapters" / "task1").rename(output / "adapters" / ".draft-task1")
    record = json.loads((output / "run.json").read_text())
    del record["stages"]["task1"], record["stages"]["task0"]["manifest"]
    (output / "run.json").write_text(json.dumps(record))
    train(place, "publishing")
    assert support.bits(output) == support.bits(whole)
    assert not list((output / "adapters").glob(".draft*"))
    assert "manifest" in json.loads((output / "run.json").read_text())["stages"]["task0"]


def test_killed_just_after_publishing(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is published is not trained again, so its record must be complete by then."""
    publish = StageTrainer._publish

    def deadly(self: StageTrainer, *given: Any) -> None:
        publish(self, *given)
        raise support.Interrupted

    with monkeypatch.context() as patched, pytest.raises(support.Interrupted):
        patched.setattr(StageTrainer, "_publish", deadly)
        train(place, "published")
    train(place, "published")
    mine, theirs = (
        json.loads((place / n / "run.json").read_text())["stages"] for n in ("published", "whole")
    )
    for stage in (*mine.values(), *theirs.values()):
        assert stage.pop("train_seconds") > 0
    assert mine == theirs


def test_a_finished_run_does_nothing_more(place: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "adapters").rglob("*")}
    train(place, "whole")
    assert {path: path.stat().st_mtime_ns for path in (whole / "adapters").rglob("*")} == before
    assert (whole / "evaluated.txt").read_text().split() == ["-1", "0", "1"]


def test_another_configuration_is_refused_by_name(place: Path, whole: Path) -> None:
    with pytest.raises(DeloError, match="train.lr: the run has 0.01, given 0.02"):
        train(place, "whole", "--train.lr=0.02")
    train(place, "whole", "--train.log_every=5")  # what decides no number may change


def test_other_data_is_refused_by_name(place: Path, whole: Path) -> None:
    file = place / "task1_test.json"
    original = file.read_text()
    try:
        file.write_text(original.replace("red", "blue"))
        with pytest.raises(DeloError, match="data task1.test: the run has"):
            train(place, "whole")
    finally:
        file.write_text(original)


def test_another_base_is_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    tiny_models.tiny_llava(other)
    weights = other / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(DeloError, match="base weights: the run has"):
        train(place, "whole", f"--model={other}")


def test_a_changed_adapter_is_named_and_nothing_is_trained(place: Path, whole: Path) -> None:
    output = copied(place, whole, "tampered")
    file = output / "adapters" / "task0" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DeloError, match="task0/adapter_config.json: its bytes differ"):
        train(place, "tampered")


def test_a_hole_in_the_sequence_is_refused(place: Path, whole: Path) -> None:
    output = copied(place, whole, "hole")
    (output / "adapters" / "task0").rename(output / "task0")
    with pytest.raises(DeloError, match="adapter of task0 is missing, but later ones exist"):
        train(place, "hole")


def curve(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["stage"], entry["step"], entry["loss"], entry["grad_norm"], entry["lr"]
