"""An evaluated run, what its evaluation wrote, and a count of what is decoded from then on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_support import make_run

from delo_eval.answers.question import Answer
from delo_eval.harness import stage as stage_module
from delo_eval.harness.generate import Answerer
from delo_eval.harness.stage import evaluate_stage
from delo_llava.methods.lora import Lora

CPU = torch.device("cpu")
STAGE = 1  # two trained tasks and the next one: 27 questions in batches of 4


@pytest.fixture(scope="module", name="original")
def evaluated(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run") / "run", recipe, "lora", Lora, 2)
    assert evaluate_stage(folder, STAGE) is not None
    return folder


@pytest.fixture(name="run")
def own_copy(original: Path, tmp_path: Path) -> Path:
    """An evaluated run of its own; its receipt holds, as files keep their times."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture(name="asked")
def batches_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are decoded from here on."""
    sizes: list[int] = []
    plain = Answerer.answer

    def counted(self: Answerer, questions: Any, tokens: int) -> list[Answer]:
        sizes.append(len(questions))
        return plain(self, questions, tokens)

    monkeypatch.setattr(Answerer, "answer", counted)
    return sizes


@pytest.fixture(name="no_model")
def model_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stage_module, "answerer", loaded)


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything an evaluation writes that must not depend on how it went."""
    results = json.loads((folder / "results.json").read_text())
    results.pop("seconds")
    files = (folder / "predictions").rglob("*.jsonl")
    return results, {str(f.relative_to(folder)): f.read_bytes() for f in files}


def counts(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "results.json").read_text())["seconds"]["answers"]["1"]
    return found


def answers_of(folder: Path, task: str = "words") -> Path:
    return folder / "answers" / "1" / "run" / f"{task}.jsonl"
