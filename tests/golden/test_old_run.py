"""Run folders of an earlier version (commit 548cc13) are evaluated, reported, compared and continued.

`old_run/lora` is complete; `old_run/delo` was left inside its second stage. Paths in them are written @ROOT@.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import delo_llava
from delo_eval.cli import main as evaluate
from delo_llava.cli import main, main_train

OLD = Path(__file__).parent / "old_run"
WORDS = [
    "--model=mini-llava", "--zero=none", "--quant=nf4", "--device=cpu", "--seed=4", "--missing.ratio=0.4",
    "--train.global_batch=4", "--train.micro_batch=2", "--train.epochs=2", "--train.lr=0.01",
    "--train.warmup=0.25", "--train.log_every=1", "--data.max_length=256", "--eval.last_patterns=complete",
]  # fmt: skip
DELO = ["--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=4"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(OLD, root)
    for path in [*root.glob("*/*.json"), *root.glob("*/*.yaml")]:
        text = path.read_text()
        package = str(Path(delo_llava.__file__).parent)
        path.write_text(text.replace("@ROOT@", str(root)).replace("@PACKAGE@", package))
    return root


def answers(run: Path, stage: str) -> dict[str, list[str]]:
    found = {}
    for file in sorted((run / "predictions" / stage).rglob("*.jsonl")):
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
        found[f"{file.parent.name}/{file.stem}"] = [row["prediction"] for row in rows]
    return found


def train(place: Path, run: str, *more: str) -> int:
    where = [f"--task_seq={place}/data/tiny.yaml", f"--data.root={place}/data", f"--output={place / run}"]
    return main_train([*where, *WORDS, *more])


def test_a_complete_run_gives_the_same_answers(place: Path) -> None:
    assert evaluate(["--run", str(place / "lora"), "--stage", "all"]) == 0
    for stage in ("0", "1"):
        assert answers(place / "lora", stage) == answers(OLD / "lora", stage)
    assert train(place, "lora", "--method=lora", "--lora.rank=1") == 0


def test_a_run_left_inside_a_stage_goes_on(
    place: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first adapter stays as it is, the stage goes on at the step where it was left, and both are
    evaluated; the scores that an older rule gave are dropped until they are given by the new one.
    """
    run = place / "delo"
    before = (run / "adapters/task0/manifest.json").read_bytes()
    words = [
        f"--task_seq={place}/data/tiny.yaml",
        f"--data.root={place}/data",
        *WORDS,
        *DELO,
        f"--output={run}",
    ]
    with pytest.raises(SystemExit):  # its version scaled the update otherwise by default
        main_train(words)
    assert "alpha_over_rank: the run has 2.0, given None" in (told := capsys.readouterr().err)
    assert "(--delo.alpha_over_rank=2.0)" in told
    with caplog.at_level(logging.WARNING):
        assert main_train([*words, "--delo.alpha_over_rank=2.0"]) == 0
    assert "task0: exact_match.v1 became exact_match.v2" in caplog.text
    record = json.loads((run / "run.json").read_text())["stages"]
    assert record["task1"]["resumed_at"] == [2]
    assert (run / "adapters/task0/manifest.json").read_bytes() == before
    results = json.loads((run / "results.json").read_text())
    assert results["matrix"]["matched"][0] == [None, None] and None not in results["matrix"]["matched"][1]
    assert evaluate(["--run", str(run), "--stage", "task0", "--no-cache"]) == 0
    assert answers(run, "0") == answers(OLD / "delo", "0")
    results = json.loads((run / "results.json").read_text())
    assert None not in [*results["matrix"]["matched"][0], *results["matrix"]["matched"][1]]


def test_they_are_compared_and_reported(place: Path, tmp_path: Path) -> None:
    board = tmp_path / "board"
    assert main(["compare", str(place / "lora"), str(place / "delo"), "--output", str(board)]) == 0
    assert (board / "leaderboard.md").is_file()
    assert evaluate(["report", "--run", str(place / "delo")]) == 0
