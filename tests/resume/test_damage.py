"""Damaged step checkpoints, full disks and read-only folders: told, nothing destroyed, the same bits in the
end; and what stays of checkpoints, metrics and times."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.cli import resolve
from delo_llava.errors import DeloError
from delo_llava.runs import step_state
from delo_llava.runs.job import make_job
from delo_llava.runs.manifest import manifest_faults, write_manifest
from delo_llava.runs.observer import StageObserver
from delo_llava.runs.sequence import run_sequence

pytestmark = pytest.mark.slow

#: The task under which steps are checkpointed, within a run.
STEPS = Path("checkpoints", "task0")


def train(place: Path, name: str, *more: str) -> Path:
    words = support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, "--train.save_every=1",
        "--lora.dropout=0.1", *more,
    )  # fmt: skip
    run_sequence(make_job(resolve(words)), None)
    return place / name


def train_until(place: Path, name: str, step: int, *more: str) -> Path:
    """A run that ends without warning at the end of `step`, before its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        done = StageObserver.step

        def ended(self: StageObserver, report: Any) -> None:
            done(self, report)
            if report.step == step:
                raise support.Interrupted

        patch.setattr(StageObserver, "step", ended)
        with pytest.raises(support.Interrupted):
            train(place, name, *more)
    return place / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    support.write_sequence(folder, tasks=1)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, "whole")


@pytest.fixture(scope="module")
def left(place: Path) -> Path:
    """Ended in its fourth and last step."""
    return train_until(place, "left", 3)


def record(run: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((run / "run.json").read_text())["stages"]["task0"]
    return entry


def assert_same_end(run: Path, whole: Path, resumed_at: list[int]) -> None:
    assert record(run)["resumed_at"] == resumed_at
    assert support.bits(run) == support.bits(whole)
    told = [[(e["step"], e["loss"], e["grad_norm"]) for e in support.metrics(path)] for path in (run, whole)]
    assert told[0] == told[1]
    assert not (run / STEPS).exists(), "published stages need no checkpoints"


def truncate(folder: Path) -> str:
    file = folder / "weights.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return f"{file.name}: its bytes differ"


def flip(folder: Path) -> str:
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(bytes(content))
    return f"{file.name}: its bytes differ"


def remove_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json: missing"


def garble(folder: Path) -> str:
    (folder / "state.json").write_text("\x00{]")
    return "state.json: its bytes differ"


DAMAGES = (truncate, flip, remove_manifest, garble)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_older_checkpoint_is_used(
    place: Path, whole: Path, left: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(left, place / damage.__name__))
    assert sorted(path.name for path in (run / STEPS).iterdir()) == ["step-000002", "step-000003"]
    told = damage(run / STEPS / "step-000003")
    train(place, run.name)
    said = capsys.readouterr().err
    assert "a checkpoint is damaged, going on from step 2" in said and f"step-000003/{told}" in said
    (noted,) = record(run)["bad_checkpoints"]
    assert f"step-000003/{told}" in noted
    assert_same_end(run, whole, [2])


def test_without_a_good_one_the_stage_begins_again(
    place: Path, whole: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(left, place / "all_bad"))
    told = [flip(run / STEPS / "step-000003"), garble(run / STEPS / "step-000002")]
    train(place, run.name)
    assert "going on from the beginning of the stage" in capsys.readouterr().err
    assert all(text in noted for text, noted in zip(told, record(run)["bad_checkpoints"], strict=True))
    assert_same_end(run, whole, [])


# ---- a disk that does not take it ----
@pytest.fixture
def small_disk(place: Path, left: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run whose checkpoints lie on a disk with room for one and a half of them."""
    run = place / request.node.name.partition("[")[0]
    size = sum(file.stat().st_size for file in (left / STEPS / "step-000003").iterdir())
    disk = run / STEPS.parent
    disk.mkdir(parents=True)
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield run
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def remount(run: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(run / STEPS.parent)], check=True)


def assert_intact(run: Path, *steps: int) -> None:
    folders = [run / STEPS / f"step-{step:06d}" for step in steps]
    assert sorted((run / STEPS).glob("step-*")) == folders
    assert not any(manifest_faults(folder) for folder in folders)


def test_a_full_disk(place: Path, whole: Path, small_disk: Path) -> None:
    with pytest.raises(DeloError, match=r"checkpoint cannot be written(.|\n)*MiB free(.|\n)*make room"):
        train(place, small_disk.name)
    assert_intact(small_disk, 1)
    remount(small_disk, "size=64m")
    train(place, small_disk.name)
    assert_same_end(small_disk, whole, [1])


def test_a_read_only_folder(place: Path, whole: Path, small_disk: Path) -> None:
    remount(small_disk, "size=64m")
    train_until(place, small_disk.name, 1)
    (small_disk / STEPS / ".draft-step-000002-dead").mkdir()
    remount(small_disk, "ro")
    with pytest.raises(DeloError, match=r"[Rr]ead-only(.|\n)*make room or rights"):
        train(place, small_disk.name)
    assert_intact(small_disk, 1)
    remount(small_disk, "rw")
    train(place, small_disk.name)
    assert_same_end(small_disk, whole, [1])


def test_a_write_that_fails_leaves_older_ones(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a disk of its own: the second checkpoint's last file finds no room."""
    write, calls = step_state.write_json_atomic, list[Path]()

    def full(path: Path, value: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(step_state, "write_json_atomic", full)
    with pytest.raises(DeloError, match=r"checkpoint cannot be written(.|\n)*No space left"):
        train(place, "full")
    assert_intact(place / "full", 1)
    train(place, "full")
    assert_same_end(place / "full", whole, [1])


# ---- what stays ----
def test_without_saving_nothing_is_stored(place: Path, whole: Path) -> None:
    run = train_until(place, "unsaved", 3, "--train.save_every=0")
    assert not (run / STEPS).exists()
    assert_same_end(train(place, "unsaved", "--train.save_every=0"), whole, [])


def test_times_add_up_over_launches(place: Path, left: Path) -> None:
    run = Path(shutil.copytree(left, place / "times"))
    newest = run / STEPS / "step-000003"
    state = json.loads((newest / "state.json").read_text())
    assert 0 < state["ledger"]["seconds"] < 100
    state["ledger"]["seconds"] = 1000.0
    (newest / "state.json").write_text(json.dumps(state))
    write_manifest(newest)
    train(place, "times")
    assert 1000 < record(run)["train_seconds"] < 1100
    assert record(run)["resumed_at"] == [3]


def test_tensorboard_holds_every_step_once(place: Path, whole: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_until(place, "board", 2, "--train.tensorboard=true", "--train.save_every=2")
    train(place, "board", "--train.tensorboard=true", "--train.save_every=2")
    assert_same_end(run, whole, [2])
    board = events.EventAccumulator(str(run / "logs/tensorboard/stage0"))
    board.Reload()
    losses = board.Scalars("task0/loss")
    assert [event.step for event in losses] == [0, 1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([e["loss"] for e in support.metrics(whole)])
    assert not (whole / "logs/tensorboard").exists(), "off unless asked for"
