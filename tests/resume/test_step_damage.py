"""Step checkpoints that are damaged or find no room: the run still ends in the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.checkpoint import steps as steps_module
from delo_llava.cli import resolve
from delo_llava.errors import DeloError
from delo_llava.training import observer, signals
from delo_llava.training.signals import Preempted
from delo_llava.training.stages import run_sequence

pytestmark = pytest.mark.slow

STEPS = 6  # of the one stage: 16 records three times in batches of 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    support.write_sequence(folder, tasks=1)
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    model = tiny_models.session("llava")
    few = ["--train.epochs=3", "--train.save_every=1", "--train.keep=2"]
    return support.words(place / "tiny.yaml", model, place / name, *few, *more)


def train(place: Path, name: str, *more: str) -> Path:
    run_sequence(resolve(words(place, name, *more)))
    return place / name


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, "whole")


@pytest.fixture
def left(place: Path, whole: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was asked to leave after step 3: checkpoints 3 and 4 are there."""
    name = request.node.name.replace("[", "-").replace("]", "")
    step = observer.StageObserver.step

    def asked(self: observer.StageObserver, report: Any) -> None:
        step(self, report)
        if report.step == 3:
            signals._received.append("SIGUSR1")

    monkeypatch.setattr(observer.StageObserver, "step", asked)
    try:
        with pytest.raises(Preempted):
            train(place, name)
    finally:
        signals.clear()
        monkeypatch.undo()
    assert published(place / name) == ["step-000003", "step-000004"]
    return place / name


def published(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints" / "task0").glob("step-??????"))


def curve(run: Path) -> list[tuple[Any, ...]]:
    return [(e["stage"], e["step"], e["loss"], e["grad_norm"]) for e in support.metrics(run)]


def assert_same(run: Path, whole: Path) -> None:
    assert support.bits(run) == support.bits(whole)
    assert curve(run) == curve(whole), "no step is missing and none is there twice"
    assert not (run / "checkpoints" / "task0").exists(), "a published stage needs no checkpoints"


def cut(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garbage(folder: Path) -> None:
    (folder / "state.json").write_text("}{")


@pytest.mark.parametrize("harm", [cut, flip, lose_manifest, garbage])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    left: Path, whole: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(left / "checkpoints" / "task0" / "step-000004")
    train(left.parent, left.name)
    assert "is damaged, going on from step 3" in capsys.readouterr().err
    record = json.loads((left / "run.json").read_text())["stages"]["task0"]
    assert any("step-000004" in fault for fault in record["bad_checkpoints"])
    assert record["resumed_at"] == [3]
    assert_same(left, whole)


def test_with_all_checkpoints_damaged_the_stage_starts_again(
    left: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in published(left):
        cut(left / "checkpoints" / "task0" / name)
    train(left.parent, left.name)
    assert "going on from the beginning of the stage" in capsys.readouterr().err
    assert_same(left, whole)


def test_an_undamaged_run_goes_on_where_it_was(left: Path, whole: Path) -> None:
    train(left.parent, left.name)
    record = json.loads((left / "run.json").read_text())["stages"]["task0"]
    assert record["resumed_at"] == [4] and record["train_seconds"] > 0
    assert_same(left, whole)


def test_a_full_disk_leaves_the_older_checkpoints(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third checkpoint finds no room; with room made, the same command goes on from the second."""
    write = steps_module.write_manifest

    def full(folder: Path) -> None:
        if "step-000003" in folder.name:
            raise OSError(28, "No space left on device")
        write(folder)

    monkeypatch.setattr(steps_module, "write_manifest", full)
    with pytest.raises(DeloError, match="No space left on device") as told:
        train(place, "full")
    assert "make room" in told.value.render() and "MiB free" in told.value.render()
    assert published(place / "full") == ["step-000001", "step-000002"]
    monkeypatch.undo()
    train(place, "full")
    assert json.loads((place / "full" / "run.json").read_text())["stages"]["task0"]["resumed_at"] == [2]
    assert_same(place / "full", whole)


def test_so_many_stay_and_none_where_none_are_wanted(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[str]]] = {"keep": [], "none": []}
    step = observer.StageObserver.step
    for name, more in {"keep": ["--train.keep=3"], "none": ["--train.save_every=0"]}.items():

        def look(self: observer.StageObserver, report: Any, name: str = name) -> None:
            seen[name].append(published(place / name))
            step(self, report)

        monkeypatch.setattr(observer.StageObserver, "step", look)
        train(place, name, *more)
        assert_same(place / name, whole)
    assert [len(found) for found in seen["keep"]] == [0, 1, 2, 3, 3, 3]
    assert seen["none"] == [[]] * STEPS


def test_a_checkpoint_of_other_settings_is_not_used(left: Path) -> None:
    """Another learning rate is refused as for every run, a foreign checkpoint by its own facts."""
    with pytest.raises(DeloError, match=r"train\.lr"):
        train(left.parent, left.name, "--train.lr=0.5")
    state = left / "checkpoints" / "task0" / "step-000004" / "state.json"
    content = json.loads(state.read_text()) | {"task": "another"}
    state.write_text(json.dumps(content))
    steps_module.write_manifest(state.parent)
    with pytest.raises(DeloError, match="not of this stage"):
        train(left.parent, left.name)
    shutil.rmtree(state.parent)
