"""Lengths in tokens: those of the very batches, shared by ranks, and what they save where pictures differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import training_support as support
from PIL import Image

from delo_llava.backbones.base import find_backbone
from delo_llava.cli import main_train, resolve
from delo_llava.config import RunConfig
from delo_llava.data.examples import Examples
from delo_llava.data.recipe import load_sequence
from delo_llava.engines.ranks import Ranks
from delo_llava.methods.base import Part
from delo_llava.runs.stage import examples_of
from delo_llava.training.fit import Kit
from delo_llava.training.lengths import token_lengths
from delo_llava.training.mixture import StageBatches

SIZES = ((56, 56), (112, 56), (224, 224), (448, 224), (336, 448))


class Share(Ranks):
    """A rank that sees its own share alone, as if nobody answered."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def stage(folder: Path, *words: str, records: int = 64) -> tuple[RunConfig, Examples, Kit]:
    """A task whose pictures are of very unlike sizes, for Qwen2.5-VL, which makes tokens of each size."""
    recipe = support.write_sequence(folder, tasks=1, records=records)
    random = np.random.default_rng(0)
    file = folder / "task0_train.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    for i, row in enumerate(rows):
        size = SIZES[random.integers(len(SIZES))]
        row["image"] = f"images/of{i}.png"
        row["context"] = "a word " * int(random.integers(1, 30))
        Image.new("RGB", size, "red").save(folder / row["image"])
    file.write_text(json.dumps(rows))
    model = tiny_models.session("qwen2_5_vl")
    config = resolve(
        support.words(
            recipe, model, folder / "run", "--data.lengths=tokens", "--data.max_pixels=200000", *words
        )
    )
    sequence = load_sequence(config.task_seq, config.data.root)
    backbone, base = find_backbone(config.model)
    kit = Kit(backbone, backbone.load_processor(base, config.data.limits), sequence.rooms)
    return config, examples_of(config, list(sequence.tasks)), kit


def lengths(config: RunConfig, examples: Examples, kit: Kit) -> list[int]:
    return token_lengths(examples, config, Ranks(0, 1, torch.device("cpu")), kit)


@pytest.mark.parametrize("missing", ["absent", "dummy"])
def test_they_are_those_of_the_batches_and_of_any_number_of_ranks(missing: str, tmp_path: Path) -> None:
    given = stage(tmp_path, f"--missing.image={missing}", "--data.max_length=260", records=12)
    config, examples, kit = given
    found = lengths(*given)
    collator = kit.collator(config)
    alone = [int(collator([examples[i]]).inputs["attention_mask"].sum()) for i in range(len(examples))]
    assert found == alone and len(set(found)) > 4
    assert max(found) <= 260
    parts = [token_lengths(examples, config, Share(rank, 3, torch.device("cpu")), kit) for rank in range(3)]
    assert [sum(part) for part in zip(*parts, strict=True)] == found


def padding(steps: list[list[int]], known: list[int]) -> float:
    """Padded ÷ real tokens of passes of eight, as one rank makes them of batches that have pictures all."""
    passes = [step[i : i + 8] for step in steps for i in range(0, len(step), 8)]
    return sum(len(p) * max(known[i] for i in p) for p in passes) / sum(known[i] for p in passes for i in p)


def test_batches_hold_less_padding_than_by_estimated_lengths(tmp_path: Path) -> None:
    words = ("--missing.ratio=0", "--train.global_batch=8", "--train.micro_batch=8", "--train.epochs=1")
    config, examples, kit = stage(tmp_path, *words, records=512)
    known = lengths(config, examples, kit)
    mixture = (Part(examples),)
    exact, estimated = (StageBatches(config, mixture, 3, given).steps for given in (known, None))
    assert sorted(i for step in exact for i in step) == list(range(512))
    assert padding(exact, known) < 1.05 < 1.3 < padding(estimated, known)


def test_a_picture_that_cannot_be_used_counts_without_it(tmp_path: Path) -> None:
    config, examples, kit = stage(tmp_path, "--missing.ratio=0", "--data.on_bad_image=skip", records=4)
    whole = lengths(config, examples, kit)
    (tmp_path / "images" / "of1.png").write_bytes(b"no picture")
    found = lengths(config, examples, kit)
    assert found[1] < whole[1] and found[:1] + found[2:] == whole[:1] + whole[2:]


def test_a_run_goes_by_them_and_its_steps_are_those_of_a_resumed_one(tmp_path: Path) -> None:
    config, _, _ = stage(tmp_path, "--train.max_steps=3", records=16)
    words = support.words(
        tmp_path / "tiny.yaml", tiny_models.session("qwen2_5_vl"), tmp_path / "run", "--data.lengths=tokens",
        "--train.max_steps=3", "--eval.last_patterns=[]",
    )  # fmt: skip
    assert config.data.lengths == "tokens"
    assert main_train(words) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["task0"]["steps"] == 3
