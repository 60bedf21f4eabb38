"""Rates and AdamW: ours, so that no DeepSpeed file can change the recipe."""

import math
from typing import Any

import torch

from delo_llava.config import TrainConfig


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
