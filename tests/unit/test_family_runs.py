"""Every family planned without weights, and trained through two stages and evaluated by the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import training_support as support
from family_support import KINDS, loaded
from transformers import AutoConfig

from delo_llava import cli
from delo_llava.backbones.base import adapted_linears
from delo_llava.cluster.measure import measure_step
from delo_llava.cluster.memory import MemoryModel, Setup
from delo_llava.cluster.models import planned_model
from delo_llava.cluster.simulate import meta_model
from delo_llava.config import load_config
from delo_llava.data.dialogue import Dialogue
from delo_llava.registry import load_plugin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

#: LLaVA-NeXT's grids, and all of OneVision's: up to six tiles along a side.
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * down, 384 * right] for down in range(1, 7) for right in range(1, 7)]
SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 14, "hidden_size": 1152}

#: family, what of a published configuration decides tokens, tokens of 1024×768, patches in the tower.
PUBLISHED = [
    ("llava", {}, 576, 576),
    ("qwen2_vl", {}, 999, 3996),
    ("qwen2_5_vl", {}, 999, 3996),
    ("qwen3_vl", {}, 768, 3072),
    ("qwen3_vl_moe", {}, 768, 3072),
    ("internvl", {}, 3328, 13 * 1024),
    ("llava_next", {"image_grid_pinpoints": NEXT}, 2340, 5 * 576),
    ("llava_onevision", {"image_grid_pinpoints": ONEVISION}, 4725, 7 * 729),
    ("smolvlm", {"vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3}, 1053, 13 * 729),
    ("idefics3", {"vision_config": {"image_size": 364, "patch_size": 14}, "scale_factor": 2}, 2197, 13 * 676),
    ("gemma3", {"vision_config": {**SIGLIP, "image_size": 896}}, 256, 4096),
    ("paligemma", {"vision_config": {**SIGLIP, "image_size": 224}}, 256, 256),
    ("paligemma", {"vision_config": {**SIGLIP, "image_size": 896}}, 4096, 4096),
]


@pytest.mark.parametrize(("family", "facts", "tokens", "patches"), PUBLISHED)
def test_a_picture_of_1024_by_768_is_planned(
    family: str, facts: dict[str, Any], tokens: int, patches: int
) -> None:
    backbone: Any = load_plugin("backbone", family)
    image = backbone.planned_image(AutoConfig.for_model(family, **facts))
    assert (image.tokens, image.patches) == (tokens, patches)
    assert image.floats >= 6 * 1024
    assert image.with_tokens(2 * tokens).patches == 2 * patches


@pytest.mark.parametrize("kind", KINDS)
def test_the_planner_sees_the_model_that_is_trained(kind: str) -> None:
    backbone, model, parts = loaded(kind)
    planned = meta_model(backbone, parts.config, torch.float32)
    assert adapted_linears(planned, backbone) == adapted_linears(model, backbone)
    assert {n: p.shape for n, p in planned.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


@pytest.mark.long
@pytest.mark.parametrize("kind", [*tiny_models.BUILDERS, "qwen3_vl", "llava_next", "llava_onevision"])
def test_a_planned_step_needs_what_a_real_one_does(kind: str, tmp_path: Path) -> None:
    folder = tiny_models.session(kind)
    words = [f"--model={folder}", "--method=delo", "--quant=none", "--train.micro_batch=8"]
    run = load_config(None, words)
    found = measure_step(run, tmp_path / "picture.png", words=200)
    memory = MemoryModel(
        planned_model(str(folder), found.image_tokens), run, found.tokens, cuda=False, answers=found.answers
    )
    planned = memory.step_bytes(Setup("none", "none", False, 8, 1))
    assert planned == pytest.approx(found.step, rel=0.10)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["delo", "lora"])
def test_two_stages_are_trained_published_and_answered(kind: str, method: str, tmp_path: Path) -> None:
    recipe = support.write_sequence(tmp_path, records=8)
    output = tmp_path / "run"
    words = support.words(
        recipe, tiny_models.session(kind), output, f"--method={method}", "--quant=nf4", "--train.epochs=1",
        "--train.gradient_checkpointing=true", "--delo.rank=2", "--delo.pool_size=4",
        "--delo.cross_modal=ridge",
        "--eval.batch_size=4",
    )  # fmt: skip
    assert cli.main_train(words) == 0
    losses = [step["loss"] for step in support.metrics(output)]
    assert losses and all(0 < value < 20 for value in losses)
    results = json.loads((output / "results.json").read_text())
    grid = results["matrix"].get("matched") or results["matrix"]["oracle"]
    assert all(score is not None for score in grid[1])
    recorded = Dialogue(**json.loads((output / "run.json").read_text())["dialogue"])
    assert recorded == loaded(kind)[2].dialogue
