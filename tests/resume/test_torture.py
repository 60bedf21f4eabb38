"""The short form of `torture.py`: a few kills in each engine; the long form is in docs/reliability.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torture

pytestmark = [pytest.mark.distributed, pytest.mark.long]


@pytest.mark.parametrize(("method", "zero", "seed"), [("lora", "none", 3), ("delo", "2", 4)])
def test_killed_at_random_and_started_again_it_ends_in_the_same_bits(
    tmp_path: Path, method: str, zero: str, seed: int
) -> None:
    summary = tmp_path / "summary.json"
    words = ["--kills=3", "--tasks=2", f"--method={method}", f"--zero={zero}", f"--seed={seed}"]
    done = subprocess.run(
        [sys.executable, torture.__file__, *words, f"--folder={tmp_path}", f"--output={summary}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert summary.is_file(), f"{done.stdout}\n{done.stderr}"
    found = json.loads(summary.read_text())
    assert found["kills"] == 3
    assert found["differences"] == []
    assert found["complete_runs_compared"] >= 2
    assert done.returncode == 0


def test_every_kind_of_difference_is_seen(tmp_path: Path) -> None:
    """The comparison is what the torture stands on: each thing that may go wrong is told by name."""
    whole, run = _run(tmp_path / "whole"), _run(tmp_path / "run")
    assert torture.differences(whole, run) == []
    (run / "adapters" / "a" / "weights").write_bytes(b"11")
    (run / "predictions" / "a.jsonl").write_text("{}\n\n")
    (run / ".run.json.7.tmp").touch()
    (run / "evaluated").unlink()
    (run / "results.json").write_text(json.dumps({"seconds": 7, "matrix": [[1.0, None], [2.0, 3.5]]}))
    line = {"stage": 0, "step": 1, "loss": 0.25, "time": 9}
    (run / "logs" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert torture.differences(whole, run) == [
        ".run.json.7.tmp: left over",
        "evaluated: missing",
        "adapters/a/weights: other bytes",
        "logs/metrics.jsonl[0].loss: 0.5 became 0.25",
        "predictions/a.jsonl: other bytes",
        "results.json.matrix[1][1]: 3.0 became 3.5",
    ]


def _run(folder: Path) -> Path:
    """What a complete run's folder looks like, as far as it is compared."""
    files = {
        "adapters/a/weights": "10",
        "predictions/a.jsonl": "{}\n",
        "logs/metrics.jsonl": json.dumps({"stage": 0, "step": 1, "loss": 0.5, "time": id(folder)}) + "\n",
        "results.json": json.dumps({"seconds": id(folder), "matrix": [[1.0, None], [2.0, 3.0]]}),
        "run.json": json.dumps({"stages": {"a": {"steps": 4, "train_seconds": id(folder)}}}),
        "evaluated": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
