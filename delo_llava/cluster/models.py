"""Configurations of known models, so that a job can be planned without weights and without a network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from delo_llava.backbones._planned import PlannedImage
from delo_llava.backbones.base import OWN_CODE, Backbone, find_backbone
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names

SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class PlannedModel:
    """A model's configuration and layout, and the picture that it is planned with."""

    name: str
    config: Any
    backbone: Backbone
    image: PlannedImage


def shipped_names() -> list[str]:
    """Names of the configurations that are part of the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def planned_model(name: str, image_tokens: int | None = None) -> PlannedModel:
    """The model `name`: a shipped configuration (with or without its hub prefix), a folder, or a hub id.

    Args:
        image_tokens: of one image, if not the family's number for 1024×768.

    Raises:
        DeloError: no such model, or a family that nothing is known of.
    """
    shipped = SHIPPED / f"{name.rsplit('/', 1)[-1]}.json"
    config = _shipped(shipped) if shipped.is_file() else _given(name)
    backbone = _backbone(config.model_type)
    image = backbone.planned_image(config)
    return PlannedModel(
        name, config, backbone, image if image_tokens is None else image.with_tokens(image_tokens)
    )


def _shipped(path: Path) -> Any:
    from transformers import AutoConfig

    facts = json.loads(path.read_text(encoding="utf-8"))
    return AutoConfig.for_model(facts.pop("model_type"), **facts)


def _given(name: str) -> Any:
    """The configuration of a folder or a hub id; only the latter may use the network."""
    from transformers import AutoConfig

    try:
        _, path = find_backbone(name)
        return AutoConfig.from_pretrained(path, **OWN_CODE)
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
    raise DeloError("No backbone knows this model type.", given=kind, allowed=plugin_names("backbone"))
