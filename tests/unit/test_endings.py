"""What ends a command is a sentence and an exit code; no bad input shows a traceback."""

import errno
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from delo_llava import endings
from delo_llava.endings import GOES_ON, as_known, told
from delo_llava.engines.signals import EXIT_CODE, Preempted
from delo_llava.errors import DeloError


def ended(capsys: pytest.CaptureFixture[str], error: BaseException, **options: Any) -> tuple[int, str]:
    def command() -> int:
        raise error

    try:
        code: Any = told(command, **options)
    except SystemExit as left:
        code = left.code
    return code, capsys.readouterr().err


def test_what_a_command_returns_is_its_code() -> None:
    assert told(lambda given: given + 1, 2) == 3


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ("No space left", "MiB free", "make room")),
        (errno.EDQUOT, ("quota", "MiB free")),
        (errno.EACCES, ("Permission denied", "rights")),
        (errno.EROFS, ("Read-only", "another place")),
        (errno.ENAMETOOLONG, ("too long", "shorter")),
        (errno.ENOENT, ("No such file", "check the path")),
        (errno.EISDIR, ("folder",)),
    ],
)
def test_what_the_system_refuses_names_the_file_and_what_helps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, number: int, words: tuple[str, ...]
) -> None:
    path = tmp_path / "not/there/x.json"
    code, text = ended(capsys, OSError(number, os.strerror(number), str(path)), goes_on=True)
    assert code == DeloError.exit_code and str(path) in text and "Traceback" not in text
    assert all(word in text for word in words) and text.endswith(f"{GOES_ON}\n")


def test_two_paths_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        os.rename(tmp_path / "one", tmp_path / "other")
    known = as_known(caught.value)
    assert known is not None and f"{tmp_path}/one -> {tmp_path}/other" in known.render()


def test_a_taken_port_names_the_option() -> None:
    for error in (
        OSError(errno.EADDRINUSE, "Address already in use"),
        RuntimeError("The server socket has failed to listen … (errno: 98 - Address already in use)."),
        RuntimeError("EADDRINUSE: 29500\nframe #0"),
    ):
        known = as_known(error)
        assert known is not None and "--master_port" in known.render() and "frame" not in known.render()


def test_a_peer_that_is_gone_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1\nframe #1")
    code, text = ended(capsys, error, goes_on=True)
    assert code == DeloError.exit_code and "Another rank" in text and GOES_ON in text
    assert "Traceback" not in text and "frame" not in text


def test_what_nobody_foresaw_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(capsys, ZeroDivisionError("x"))
    assert code == endings.UNFORESEEN and "Traceback" in text and "ZeroDivisionError: x" in text
    assert GOES_ON not in text


def test_a_delo_error_brings_its_own_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(capsys, DeloError("Bad \x1b[2J.", fix="mend it"), goes_on=True)
    assert code == 2 and text == "error: Bad \\x1b[2J.\n  fix:     mend it\n"


def test_signals_and_ctrl_c_have_codes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, Preempted("SIGTERM", "training")) == (
        EXIT_CODE,
        "asked to leave by SIGTERM while training; the same command goes on from there\n",
    )
    assert ended(capsys, KeyboardInterrupt(), goes_on=True) == (130, f"interrupted\n  {GOES_ON}\n")


@pytest.mark.parametrize("words", [["list", "scorers"], ["data", "show", "mini6", "-n", "20"]])
def test_whoever_reads_may_leave(words: list[str]) -> None:
    """`… | head -1`: no word, no traceback."""
    text = f"{sys.executable} -m delo_llava.cli {' '.join(words)} | head -1"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_an_output_in_ascii_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert told(lambda: out.write("na\u00efve \u2713") and 0) == 0
    assert out.buffer.getvalue() == b"na\\xefve \\u2713"  # type: ignore[attr-defined]


def test_a_file_in_another_encoding_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"caf\xe9".decode()
    code, text = ended(capsys, caught.value)
    assert code == 2 and "UTF-8" in text and "iconv" in text


def test_libraries_do_not_speak_to_their_own_developers() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        endings.quiet_libraries()
        place = {"filename": "x.py", "lineno": 1}
        warnings.warn_explicit("going", FutureWarning, module="transformers.modeling_utils", **place)  # type: ignore[arg-type]
        warnings.warn_explicit("going", FutureWarning, module="torch.distributed.c10d_logger", **place)  # type: ignore[arg-type]
        warnings.warn_explicit("going", FutureWarning, module="mine", **place)  # type: ignore[arg-type]
    assert [str(w.message) for w in caught] == ["going"]
