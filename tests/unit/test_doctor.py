"""The doctor: a fit machine passes, and each thing that can be wrong is found with its remedy."""

import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from delo_llava import cli
from delo_llava.backbones import _quant
from delo_llava.cluster import doctor
from delo_llava.cluster.doctor import Finding


def worst(found: Iterable[Finding]) -> Finding:
    return max(found, key=lambda finding: ("ok", "warning", "error").index(finding.level))


def test_a_fit_machine_passes_and_two_processes_meet(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["doctor", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name in (
        "python",
        "versions",
        "device",
        "4 bit",
        "attention",
        "deepspeed",
        "launcher",
        "disk",
        "network",
    ):
        assert name in said
    assert "two processes met" in said


def test_versions_are_compared_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that only an extra needs may be absent."""
    lock = tmp_path / "requirements.lock"
    lock.write_text("# pins\nrich==0.1\nno_such.package==1.0\nof-an-extra==1.0\n")
    lines = ["rich>=0.1", "no-such-package>=1; python_version>'3'", "of-an-extra>=1; extra == 'more'"]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    absent, other = doctor._versions(lock)
    assert absent.text == "not installed: no_such.package" and absent.level == "warning"
    assert "rich" in other.text and "locked 0.1" in other.text
    assert other.remedy == "pip install -c requirements.lock -e ."
    assert worst(doctor._versions(tmp_path / "none")).level == "warning"


def test_a_wrong_four_bit_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(doctor._four_bit()).level == "ok"
    monkeypatch.setattr(_quant, "round_trip_error", lambda device: 0.9)
    assert worst(doctor._four_bit()).level == "error"


def test_a_killed_build_s_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert worst(doctor._deepspeed()).level == "ok"
    (tmp_path / "py311_cpu" / "fused_adam").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.touch()
    found = worst(doctor._deepspeed())
    assert found.level == "error" and str(lock) in found.text and "remove" in found.remedy


def test_another_environment_s_launcher_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "deepspeed"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert str(other) in worst(doctor._launcher()).text


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage

    def full(path: Any) -> Any:
        return real(path)._replace(free=2**20) if Path(path) == tmp_path else real(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    assert next(doctor._disk(tmp_path / "runs")).level == "error"


def test_few_open_files_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    found = next(doctor._limits())
    assert found.level == "warning" and found.remedy == "ulimit -n 1024"


def test_processes_that_cannot_meet_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not doctor.meets("203.0.113.7"), "an address of no interface of this machine"
    monkeypatch.setattr(doctor, "meets", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(doctor.socket, "gethostbyname", lambda name: "203.0.113.7")
    found = worst(doctor._rendezvous())
    assert found.level == "warning" and "GLOO_SOCKET_IFNAME" in found.remedy


def test_an_error_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "findings", lambda *_: iter([Finding("disk", "error", "full", "make room")]))
    assert cli.main(["doctor", "--folder", str(tmp_path)]) == 1
    assert "-> make room" in capsys.readouterr().out
