"""Sequences no longer than the base has positions for: known from its config.json, before any weights."""

from typing import Any

from delo_llava.config import RunConfig
from delo_llava.errors import DeloError

#: Rotary embeddings that are stretched beyond the positions that `max_position_embeddings` names. (`llama3`
#: names the stretched ones.)
STRETCHED = ("linear", "dynamic", "yarn", "longrope")


def positions(model: Any) -> int | None:
    """How many positions a model's language part has, None where its configuration names no number.

    Args:
        model: a configuration of transformers.
    """
    text = model.get_text_config()
    known: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if known and rope.get("rope_type") in STRETCHED and rope.get("factor"):
        known = max(known, int(rope["factor"] * (rope.get("original_max_position_embeddings") or known)))
    return known


def within_positions(config: RunConfig, model: Any) -> tuple[RunConfig, list[str]]:
    """The settings with a `data.max_length` for which the model has positions, and what was changed, to be
    told: a default gives way, which the user has not asked for.

    Args:
        model: its configuration of transformers.

    Raises:
        DeloError: the user asked for more.
    """
    known, wanted = positions(model), config.data.max_length
    if known is None or wanted <= known:
        return config, []
    if config.data.asks_length:
        raise DeloError(
            f"{config.model} has positions for {known} tokens, and never saw longer sequences.",
            given=f"data.max_length={wanted}",
            fix=f"use --data.max_length={known} or less; longer contexts are cut then, and counted",
        )
    data = config.data.model_copy(update={"max_length": known})
    told = f"data.max_length is {known} instead of {wanted}, as {config.model} has no more positions"
    return config.model_copy(update={"data": data}), [told]
