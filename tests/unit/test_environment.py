"""The scripts' own environment: which Python it is made with."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_old_python_is_told_and_nothing_is_made(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho Python 3.9.2\n')
    old.chmod(0o755)
    given = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(old)}
    done = subprocess.run(
        ["bash", "launch/test.sh"], cwd=ROOT, env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not (tmp_path / "venv").exists()
    assert done.stderr.splitlines() == [
        "error: Python 3.11 or newer is needed",
        "  given: Python 3.9.2",
        "  fix:   name one: PYTHON=python3.11 bash launch/test.sh",
    ]
