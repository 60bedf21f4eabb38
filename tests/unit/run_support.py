"""Runs of a small sequence as training leaves them, with random adapters; ranks that stand alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from PIL import Image
from torch import nn

from delo_llava.backbones.base import find_backbone
from delo_llava.config import dump_config, load_config
from delo_llava.data.collate import Batch
from delo_llava.data.recipe import load_sequence
from delo_llava.engines import signals
from delo_llava.engines.ranks import Ranks
from delo_llava.methods.base import Capabilities, Prompt, Stage, TaskChoice
from delo_llava.methods.individual import Individual
from delo_llava.methods.lora import Lora
from delo_llava.runs.identity import base_facts, data_hashes
from delo_llava.runs.store import RunStore

TASKS = ("shapes", "words", "places")
RECORDS = {"train": 2, "val": 5, "test": 9}


class Chooser(Individual):
    """Individual adapters behind a choice by the instruction; without it, always the first task."""

    capabilities: ClassVar[Capabilities] = Capabilities(chooses_task=True, isolated=True)

    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        known = tuple(model.peft_config)  # type: ignore[arg-type]
        told = [known.index(task) if views is None and task in known else 0 for task in batch.tasks]
        told = [0 if name.endswith("3") else i for name, i in zip(batch.record_ids, told, strict=True)]
        return TaskChoice(
            known, torch.tensor(told), nn.functional.one_hot(torch.tensor(told), len(known)).float()
        )

    @contextmanager
    def answering(
        self, model: Any, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        if tasks is not None:
            model.generate = lambda **inputs: self.row_by_row(model, list(tasks), inputs)
        yield Prompt.of(batch)
        vars(model).pop("generate", None)

    def row_by_row(self, model: Any, tasks: list[str], inputs: dict[str, Any]) -> torch.Tensor:
        """Every adapter answers the whole batch, and each row is taken from its own."""
        said = {}
        for task in set(tasks):
            model.set_adapter(task, inference_mode=True)
            said[task] = type(model).generate(model, **inputs)
        width = max(ids.shape[1] for ids in said.values())
        padded = {task: nn.functional.pad(ids, (0, width - ids.shape[1])) for task, ids in said.items()}
        return torch.stack([padded[task][row] for row, task in enumerate(tasks)])


class Blind(Chooser):
    """A choice that finds no evidence in records that end in 5, and in none without the instruction."""

    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        choice = super().choose(model, batch, views)
        nothing = torch.tensor([views is not None or name.endswith("5") for name in batch.record_ids])
        return TaskChoice(choice.tasks, choice.index.masked_fill(nothing, -1), choice.scores)


class Alone(Ranks):
    """One of several ranks whose peers run before it, so nothing is waited for or said."""

    def barrier(self) -> None:
        return None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def any(self, flag: bool) -> bool:
        return flag

    def same(self, value: Any) -> Any:
        return value

    def leave_soon(self) -> bool:
        return signals.requested() is not None


@pytest.fixture(scope="module", name="recipe")
def little_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    picture = root / "picture.png"
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    asked = {"shapes": "what is shown ?", "words": "what card says ?", "places": "capital of africa ?"}
    for task in TASKS:
        for split, count in RECORDS.items():
            rows = [
                {
                    "question_id": f"{task}{i}",
                    "image": "picture.png",
                    "context": "the card says " + "mango " * (i % 4),
                    "text": asked[task],
                    "answer": "red",
                }
                for i in range(count)
            ]
            (root / f"{task}_{split}.json").write_text(json.dumps(rows))
    entries = [
        {"name": t, "kind": "k", "max_new_tokens": 3, "files": {s: f"{t}_{s}.json" for s in RECORDS}}
        for t in TASKS
    ]
    file = root / "little.yaml"
    file.write_text(yaml.safe_dump({"name": "little", "tasks": entries}))
    return file


def make_run(
    folder: Path, recipe: Path, method: str, kind: type[Lora] | type[Individual], stages: int, *more: str
) -> Path:
    """A run folder as training leaves it, with random adapters."""
    words = [
        f"--task_seq={recipe}",
        f"--data.root={recipe.parent}",
        f"--model={tiny_models.session('llava')}",
        "--quant=none",
    ]
    words += [
        f"--method={method}",
        f"--{method}.rank=2",
        f"--output={folder}",
        "--missing.ratio=0.5",
        "--eval.batch_size=4",
        *more,
    ]
    config = load_config(None, words)
    store, (backbone, path) = RunStore(folder), find_backbone(config.model)
    store.create()
    store.write_config(dump_config(config))
    sequence = load_sequence(config.task_seq, config.data.root)
    facts = {"base": base_facts(store, path), "data_hashes": data_hashes(store, sequence)}
    store.update_run(**facts, versions={"torch": "2"})
    built = kind(kind.Config(**config.methods[method]), config, backbone)
    for index, task in enumerate(TASKS[:stages]):
        torch.manual_seed(index)
        stage = Stage(index, task)
        model = built.begin(backbone.load(path, quant="none", device="cpu"), stage)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter.data, std=0.5)
        with store.publish(task) as draft:
            built.save(model, stage, draft)
        store.update_stage(
            task,
            trainable_parameters=10 + index,
            train_seconds=1.5,
            world=2,
            zero="3",
            missing={"ratio": 0.5},
        )
    return folder


def predictions(folder: Path, stage: object, pattern: str = "run") -> dict[str, list[dict[str, Any]]]:
    files = sorted((folder / "predictions" / str(stage) / pattern).iterdir())
    return {file.stem: [json.loads(line) for line in file.read_text().split("\n") if line] for file in files}
