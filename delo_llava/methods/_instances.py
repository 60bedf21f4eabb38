"""Routing of an instance by what a layer itself sees of it: the mean of its input over the prompt's tokens.

The mean is a sample's own: neither padding nor template nor answer has a part in it, so training and
generation route alike, and what else is in the batch changes nothing. In `generate` it is taken at the
prefill, and what was decided there holds for every token that follows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from delo_llava.adapters.lowrank import LowRankLayer, RowPlan
from delo_llava.data.segments import SEGMENT_OTHER


def instance_means(layer: LowRankLayer, x: Tensor, plan: RowPlan) -> Tensor:
    """The mean input of each of a layer's rows, n×d_in, fp32.

    Args:
        x: R×S×d_in (or all rows' tokens in one line) in the language model; in the projector, units×T×d_in or
            tokens×d_in of the images.
    """
    if layer.projector:
        flat = x.reshape(-1, x.shape[-1])
        parts = flat.split(plan.inputs.image_lengths(len(flat)))
        return torch.stack([part.float().mean(0) for part in parts])
    counted = (plan.inputs.segments != SEGMENT_OTHER).float()
    mask = counted.repeat_interleave(plan.inputs.expand, dim=0).unsqueeze(1)
    rows = x if x.dim() == 3 else x.unflatten(0, (len(mask), -1))
    return (torch.bmm(mask, rows.float()) / mask.sum(-1, keepdim=True).clamp(min=1)).squeeze(1)


def at_prefill(layer: LowRankLayer, plan: RowPlan, make: Callable[[], Tensor]) -> Tensor:
    """What `make` decides for the rows of a layer; in decode steps, what it decided at the prefill.

    Nothing is kept while gradients are wanted: a recomputed block must make its own.
    """
    if not layer.projector and layer.carrier.offset:
        kept: Tensor = plan.extra[layer.name]
        return kept
    made = make()
    if not torch.is_grad_enabled():
        plan.extra[layer.name] = made
    return made
