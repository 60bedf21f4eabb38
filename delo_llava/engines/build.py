"""The engine that a configuration names."""

from typing import Any

from torch import nn

from delo_llava.config import RunConfig
from delo_llava.engines.base import Engine
from delo_llava.engines.deepspeed import DeepSpeedEngine
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.single import SingleEngine


def build_engine(
    module: nn.Module, groups: list[dict[str, Any]], config: RunConfig, ranks: Ranks, accumulation: int
) -> Engine:
    """The engine that `config.zero` names, over the trainable parameters in `groups`."""
    if config.zero == "none":
        return SingleEngine(module, groups, config, accumulation)
    return DeepSpeedEngine(module, groups, config, ranks, accumulation)
