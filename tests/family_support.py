"""What tests of every model family share: tiny models, records with pictures of several forms, experts."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import tiny_families
import tiny_models
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor

from delo_llava.adapters.carrier import routing
from delo_llava.backbones.base import Backbone, Parts, find_backbone
from delo_llava.data.collate import Batch, Collator
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.tuner import set_trainable
from delo_llava.tasks import Record

#: Every tiny model.
KINDS = (*tiny_models.BUILDERS, *tiny_families.BUILDERS)
#: Width and height of the records' pictures: they have different numbers of tiles.
SIZES = ((64, 64), (100, 64), (50, 130), (130, 130))
Item = tuple[Record, tuple[bool, bool]]


@cache
def loaded(kind: str) -> tuple[Backbone, Any, Parts]:
    """Backbone, frozen fp32 model and parts of a tiny model; read-only."""
    backbone, path = find_backbone(tiny_models.session(kind))
    return backbone, backbone.load(path, quant="none", device="cpu"), backbone.load_processor(path)


@cache
def items() -> list[Item]:
    """Four pictures of unequal size, and two rows without."""
    folder = Path(mkdtemp(prefix="pictures_"))
    found = []
    for i, size in enumerate((*SIZES, SIZES[0], SIZES[0])):
        draw = torch.Generator().manual_seed(i)
        noise = torch.randint(256, (size[1], size[0], 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        context = "hint: " + "it comes after " * i + "six"
        record = Record(f"r{i}", "t", "train", folder / f"{i}.png", context, f"what is shown? {i}", "four")
        found.append((record, (i < len(SIZES), i % 3 != 2)))
    return found


def batch(kind: str, rows: list[Item] | None = None, generation: bool = False) -> Batch:
    """Collated rows; all of them unless given."""
    backbone, _, parts = loaded(kind)
    return Collator(backbone, parts, 2048, generation=generation)(items() if rows is None else rows)


def experts(kind: str, base: Any = None, live: bool = True) -> PeftModel:
    """DeLo experts over a fresh base (or `base`); `live` gives B values, so that they act."""
    backbone, _, _ = loaded(kind)
    if base is None:
        base = backbone.load(str(tiny_models.session(kind)), quant="none", device="cpu")
    config = DeloConfig(
        target_modules=backbone.language_pattern, projector_modules=backbone.projector_pattern,
        projector=backbone.projector_name, hidden_size=backbone.hidden_size(base), r=2, pool_size=6,
        alpha=4.0, latent=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(base, config, adapter_name="one")
    for name, parameter in model.named_parameters():
        if live and "delo_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    set_trainable(model, "one")
    return model


def logits(model: Any, given: Batch) -> Tensor:
    """Of one routed forward."""
    with routing(model, RouteInputs.from_batch(given)):
        found: Tensor = model(**given.inputs).logits
    return found


def loss(model: Any, given: Batch) -> Tensor:
    """Of one routed forward over the answers."""
    with routing(model, RouteInputs.from_batch(given)):
        found: Tensor = model(**given.inputs, labels=given.labels).loss
    return found
