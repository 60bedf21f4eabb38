"""The files in docs/extending.md, dropped into a folder of plug-ins, do what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_families
import tiny_models
import training_support as support

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in TITLED.findall(PAGE.read_text(encoding="utf-8")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(plugins: Path, *words: str) -> str:
    here = {**os.environ, "DELO_LLAVA_PLUGINS": str(plugins), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "delo_llava.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=here, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_page_has_one_of_each(plugins: Path) -> None:
    assert {path.parent.name for path in plugins.rglob("*.*")} == {
        "methods",
        "backbones",
        "recipes",
        "scorers",
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("methods", "ia3_chain"),
        ("backbones", "vipllava"),
        ("recipes", "shades"),
        ("scorers", "first_word"),
    ],  # fmt: skip
)
def test_they_are_listed(plugins: Path, kind: str, name: str) -> None:
    assert name in run(plugins, "list", kind)


@pytest.mark.slow
def test_the_method_is_trained_on_the_sequence_and_scored(plugins: Path, tmp_path: Path) -> None:
    support.write_sequence(tmp_path, records=8)
    output = tmp_path / "run"
    run(
        plugins, "train", "--task_seq=shades", "--method=ia3_chain", f"--data.root={tmp_path}", "--zero=none",
        f"--model={tiny_models.session('llava')}", "--device=cpu", f"--output={output}", "--train.lr=0.05",
    )  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    assert results["scorer_ids"]["task0"] == "first_word.v1"
    assert all(score is not None for score in results["matrix"]["matched"][1])
    losses = [entry["loss"] for entry in support.metrics(output)]
    assert len(losses) == 2


@pytest.mark.slow
def test_the_backbone_is_planned_trained_and_evaluated(plugins: Path, tmp_path: Path) -> None:
    support.write_sequence(tmp_path, records=8)
    model, output = tiny_families.tiny_vipllava(tmp_path / "model"), tmp_path / "run"
    common = ("--task_seq=shades", "--method=delo", f"--data.root={tmp_path}", f"--model={model}")
    told = run(plugins, "plan", *common, "--zero=none", "--tokens=64")
    assert "16 of an image" in " ".join(told.split())
    small = ("--delo.rank=2", "--delo.pool_size=4", "--quant=nf4", "--device=cpu", "--zero=none")
    run(plugins, "train", *common, *small, f"--output={output}")
    results = json.loads((output / "results.json").read_text())
    assert all(score is not None for score in results["matrix"]["matched"][1])
