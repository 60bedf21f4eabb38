"""Configurations of known models, so that a job can be planned without weights and without a network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from delo_llava.backbones.base import Backbone, find_backbone
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names

SHIPPED = Path(__file__).parent / "configs"

#: Families that can be planned by the layout of another one, but have no backbone of their own yet.
PLANNED_AS = {"llava_next": "llava"}

#: Tokens of an image whose number follows from its size, unless the user says otherwise.
QWEN_IMAGE_TOKENS = 1280


@dataclass(frozen=True)
class PlannedModel:
    """A model's configuration and layout; `note` says what a reader of the plan must know."""

    name: str
    config: Any
    backbone: Backbone
    image_tokens: int
    note: str = ""


def shipped_names() -> list[str]:
    """Names of the configurations that are part of the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def planned_model(name: str, image_tokens: int | None = None) -> PlannedModel:
    """The model `name`: a shipped configuration (with or without its hub prefix), a folder, or a hub id.

    Args:
        image_tokens: of one image, if not the family's usual number.

    Raises:
        DeloError: no such model, or a family that nothing is known of.
    """
    shipped = SHIPPED / f"{name.rsplit('/', 1)[-1]}.json"
    config = _shipped(shipped) if shipped.is_file() else _given(name)
    kind = config.model_type
    backbone = _backbone(PLANNED_AS.get(kind, kind))
    note = ""
    if kind in PLANNED_AS:
        note = f"{kind} has no backbone here yet: this is planned as {PLANNED_AS[kind]} and cannot be trained"
    return PlannedModel(name, config, backbone, image_tokens or usual_image_tokens(config), note)


def usual_image_tokens(config: Any) -> int:
    """Tokens of one image: all patches of a CLIP tower (five tiles in LLaVA-NeXT), 1280 for Qwen-VL."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        return QWEN_IMAGE_TOKENS
    patches = int(vision.image_size // vision.patch_size) ** 2
    return patches * 5 if config.model_type == "llava_next" else patches


def _shipped(path: Path) -> Any:
    from transformers import AutoConfig

    facts = json.loads(path.read_text(encoding="utf-8"))
    return AutoConfig.for_model(facts.pop("model_type"), **facts)


def _given(name: str) -> Any:
    """The configuration of a folder or a hub id; only the latter may use the network."""
    from transformers import AutoConfig

    try:
        _, path = find_backbone(name)
        return AutoConfig.from_pretrained(path)
    except DeloError as error:
        raise DeloError(
            f"This model cannot be planned: {error.message}",
            given=name,
            allowed=[*shipped_names(), "mini-llava"],
            fix="name a shipped configuration, a folder with config.json, or a hub id",
        ) from error


def _backbone(kind: str) -> Backbone:
    for name in plugin_names("backbone"):
        backbone = cast(Backbone, load_plugin("backbone", name))
        if kind in backbone.model_types:
            return backbone
    raise DeloError(
        "No backbone knows this model type.", given=kind, allowed=[*plugin_names("backbone"), *PLANNED_AS]
    )
