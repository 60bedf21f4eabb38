"""Parameter groups, rates and AdamW: ours, so that no DeepSpeed file can change the recipe."""

import math
import re
from typing import Any

import torch
from torch import nn

from delo_llava.config import TrainConfig
from delo_llava.errors import DeloError

LANGUAGE, PROJECTOR = "language", "projector"


def parameter_groups(model: nn.Module, projector_pattern: str, train: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters in up to two groups, each with `name` and peak rate `peak`.

    Args:
        model: the model as the method built it; names may carry wrappers' prefixes and adapters' suffixes.
        projector_pattern: the backbone's full-match regex of the projector's linears.

    Raises:
        DeloError: nothing is trainable.
    """
    inside = re.compile(rf"(?:^|\.)(?:{projector_pattern})(?:\.|$)")
    groups: dict[str, list[nn.Parameter]] = {LANGUAGE: [], PROJECTOR: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[PROJECTOR if inside.search(name) else LANGUAGE].append(parameter)
    if not any(groups.values()):
        raise DeloError(
            "The method left no trainable parameter", fix="begin_task must inject what the stage trains"
        )
    peaks = {LANGUAGE: train.lr, PROJECTOR: train.projector_lr or train.lr}
    return [
        {"params": params, "name": name, "peak": peaks[name], "lr": 0.0, "weight_decay": train.weight_decay}
        for name, params in groups.items()
        if params
    ]


def build_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `groups`."""
    return torch.optim.AdamW(
        groups, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
    )


def cosine_with_warmup(step: int, steps: int, warmup: float) -> float:
    """The factor on the peak rate at `step` (from 0): linear for ceil(warmup·steps) steps, then cosine to 0.

    The first step already learns (1/w), the last step's factor is small but not zero: a step at rate 0 is
    wasted.
    """
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1.0 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def set_rates(optimizer: Any, factor: float) -> dict[str, float]:
    """Set each group's rate to factor·peak and return the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return rates(optimizer)


def rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of each group as the optimiser holds it."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
