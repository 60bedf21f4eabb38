"""Parameter groups as a method has them by default: the language layers' and the projector's, each at its
rate."""

import re
from typing import Any

from torch import nn

from delo_llava.config import TrainConfig

LANGUAGE, PROJECTOR = "language", "projector"


def parameter_groups(model: nn.Module, projector_pattern: str, train: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters in up to two groups, each with `name` and peak rate `peak`; none, if nothing
    is trainable.

    Args:
        model: the model as the method built it; names may carry wrappers' prefixes and adapters' suffixes.
        projector_pattern: the backbone's full-match regex of the projector's linears.
    """
    inside = re.compile(rf"(?:^|\.)(?:{projector_pattern})(?:\.|$)")
    groups: dict[str, list[nn.Parameter]] = {LANGUAGE: [], PROJECTOR: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[PROJECTOR if inside.search(name) else LANGUAGE].append(parameter)
    peaks = {LANGUAGE: train.lr, PROJECTOR: train.projector_lr or train.lr}
    return [
        {"params": params, "name": name, "peak": peaks[name], "lr": 0.0, "weight_decay": train.weight_decay}
        for name, params in groups.items()
        if params
    ]
