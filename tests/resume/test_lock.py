"""One process trains in a run's folder: the second is refused, the dead are succeeded, ranks must agree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.errors import DeloError
from delo_llava.runs import lock
from delo_llava.runs.lock import FILE, locked, owner_of

HOLD = """
import sys, time
from pathlib import Path
from delo_llava.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder's lock."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_a_second_process_is_told_who_trains_there(tmp_path: Path) -> None:
    child = hold(tmp_path)
    try:
        with pytest.raises(DeloError) as told, locked(tmp_path):
            pass
        text = told.value.render()
        assert f"process {child.pid}" in text and "for 0:00:" in text and "another --output" in text
        assert owner_of(tmp_path)["pid"] == child.pid, "the owner's entry is still there"
    finally:
        child.kill()
        child.wait()


def test_a_killed_process_is_succeeded_at_once(tmp_path: Path) -> None:
    child = hold(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with locked(tmp_path) as taken:
        assert f"process {child.pid}" in taken and "ended without a word" in taken
        assert owner_of(tmp_path)["pid"] == os.getpid()
    assert owner_of(tmp_path) == {}, "an orderly end leaves no owner"
    with locked(tmp_path) as taken:
        assert taken == ""


def test_an_entry_of_another_owner_is_left_alone(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / FILE).write_text(json.dumps({"id": "another", "pid": 1}))
    assert owner_of(tmp_path) == {"id": "another", "pid": 1}


def foreign(folder: Path, silent: float = 0.0, **entries: Any) -> None:
    """An owner on another host, last heard of `silent` seconds ago."""
    owner = {"host": "elsewhere", "pid": 1, "user": "u", "since": time.time() - 3700, **entries}
    (folder / FILE).write_text(json.dumps(owner))
    os.utime(folder / FILE, (time.time() - silent,) * 2)


def test_another_host_counts_as_alive_while_its_heart_beats(tmp_path: Path) -> None:
    foreign(tmp_path)
    with pytest.raises(DeloError, match=r"on elsewhere, for 1:01:4\d"), locked(tmp_path):
        pass
    foreign(tmp_path, silent=lock.DEAD_AFTER + 1)
    with locked(tmp_path) as taken:
        assert "on elsewhere" in taken


def test_a_requeued_job_takes_its_own_lock_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path, slurm_job="12")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(DeloError, match="SLURM job 12"), locked(tmp_path):
        pass
    foreign(tmp_path, slurm_job="12", slurm_restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(DeloError, match="SLURM job 12"), locked(tmp_path):
        pass  # another step of the same job
    foreign(tmp_path, slurm_job="12", slurm_restart="2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(DeloError, match="SLURM job 12"), locked(tmp_path):
        pass  # a later start of it
    foreign(tmp_path, slurm_job="12", slurm_restart="0")
    with locked(tmp_path) as taken:
        assert "SLURM job 12" in taken


def test_without_locks_of_the_kernel_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_try_lock", lambda handle: None)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    here = {"host": lock.socket.gethostname(), "boot": lock._boot(), "pid": sleeper.pid}
    try:
        foreign(tmp_path, **here)
        with pytest.raises(DeloError, match="its process runs"), locked(tmp_path):
            pass
        foreign(tmp_path, **{**here, "boot": "before the restart"})
        with locked(tmp_path):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()
    foreign(tmp_path, **here)
    with locked(tmp_path) as taken:
        assert taken


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / FILE, (0, 0))
        ends = time.monotonic() + 10
        while (tmp_path / FILE).stat().st_mtime == 0 and time.monotonic() < ends:
            time.sleep(0.01)
        assert (tmp_path / FILE).stat().st_mtime > 0


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeloError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("differs", [pytest.param("settings", marks=pytest.mark.long), "data"])
def test_ranks_that_disagree_stop_with_the_difference(
    tmp_path: Path, differs: str, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank is given another learning rate, or another file of records."""
    support.write_sequence(tmp_path)
    words = support.words(tmp_path / "tiny.yaml", tiny_models.session("llava"), tmp_path / "run", "--zero=2")
    job: dict[str, Any] = {"words": words, "second": [*words, "--train.lr=0.5"]}
    if differs == "data":  # the same settings, on a node whose folder holds other records
        support.write_sequence(tmp_path / "other", records=24)
        monkeypatch.setenv("DELO_LLAVA_DATA", str(tmp_path))
        words = [word for word in words if not word.startswith("--data.root")]
        job = {"words": words, "second_env": {"DELO_LLAVA_DATA": str(tmp_path / "other")}}
    codes = support.launch([job], tmp_path, ranks=2, timeout=240)
    said = capfd.readouterr().err
    assert all(codes), "no rank goes on"
    assert "The ranks do not run the same thing" in said
    wanted = "config train.lr: 0.01 on rank 0, 0.5 on rank 1" if differs == "settings" else "data task0.train"
    assert wanted in said
    assert not (tmp_path / "run" / "adapters" / "task0").exists()
