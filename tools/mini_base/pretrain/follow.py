"""Let a new base's projector begin where a finished mini-llava is: its image tokens are what is aimed at.

Language layers that were taken over from mini-llava read these tokens already, so the joint stage can be
short.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tools.mini_base.pretrain import family_llava

PICTURES, STEPS, ROWS = 12_000, 1_500, 1024


@torch.no_grad()
def image_tokens(folder: Path, pixels: NDArray[np.uint8]) -> Tensor:
    """mini-llava's projected image tokens of uint8 [N, 64, 64, 3]: [N, 16, 128]."""
    teacher = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    parts = (pixels[i : i + 256] for i in range(0, len(pixels), 256))
    see = family_llava.FAMILY.see
    project = teacher.model.multi_modal_projector
    return torch.cat([project(see(teacher.model.vision_tower, part)) for part in parts])


def aim(
    projector: tuple[nn.Linear, nn.Module, nn.Linear], features: Tensor, wanted: Tensor, seed: int
) -> float:
    """Fit the projector, in place, to map features [N, 16, F] to the wanted tokens [N, 16, D].

    Returns:
        The share of the wanted tokens' variance that is left in the last tenth of the steps.
    """
    first, act, second = projector
    rng = np.random.default_rng([seed, 12])
    features, wanted = features.flatten(0, 1), wanted.flatten(0, 1)
    variance, left = wanted.var(0).mean(), []
    with torch.no_grad():
        second.bias.copy_(wanted.mean(0))
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.from_numpy(rng.integers(len(features), size=ROWS))
        loss = (second(act(first(features[rows]))) - wanted[rows]).square().mean() / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        left.append(loss.item())
    return float(np.mean(left[-STEPS // 10 :]))
