"""`reglora`: a fresh LoRA per task, kept small where earlier tasks' updates were large; merged when a task is
done.

Source: SEFE (ICML 2025) without its data: RegLoRA is its half against forgetting of knowledge; rewriting
answers into other formats (ASD) is a matter of the data (specification: newer_methods, section 11).
Per linear and stage t, with U = B_t A_t (unscaled) and m_ij the number of earlier tasks τ of whose |B_τ A_τ|
the entry (i, j) is among the largest `share`:

    W_t = W_{t−1} + s·B_t A_t,     L = CE + λ · mean over linears of Σ_ij m_ij |U_ij| / Σ_ij m_ij

needs_task: no. Encoders: none. mergeable: yes. Bytes per task: 4·r·Σ(d_in + d_out) and one bit for every
weight that is adapted (0.8 GB for all linears of a 7B model, against 2.1 GB of stored positions).

Faithful but for the earlier updates, which stay one frozen pair beside a 4-bit base (the same function), and
the projector's linears, which are adapted too. The released code divides by a number of linears typed in for
one model, and holds U and its gradient for all linears at once; here they are made a few rows at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.methods._accumulated import AccumulatedMethod
from delo_llava.methods._lowrank import LowRankOptions
from delo_llava.methods.base import Capabilities, Clock, Footprint, Passes, Reduce, Stage
from delo_llava.strict import read_tensors

#: One bit for every entry of a linear's update: whether it is among the stage's largest.
IMPORTANT = "important.safetensors"
#: Entries of an update that are made at once.
ENTRIES = 1 << 22


class RegLoraOptions(LowRankOptions):
    """Options of RegLoRA.

    Attributes:
        rank: a number, or `match`: the rank whose trainable parameters come nearest to those that the method
            `like` trains in a stage.
        like: a method's name.
        alpha_over_rank: the update is scaled by this factor (alpha / r).
        dropout: on the adapter's input, while training.
        strength: weight of the regularisation [lambda].
        share: of a linear's entries that count as important for a task.
    """

    strength: float = Field(2500.0, ge=0)
    share: float = Field(0.02, gt=0, le=1)


class RegLora(AccumulatedMethod):
    """Plain LoRA, one task after the other, with a penalty where earlier tasks have theirs."""

    capabilities = Capabilities(mergeable=True)
    Config = RegLoraOptions

    def __init__(self, options: RegLoraOptions, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.options: RegLoraOptions = options
        self._stage = ""
        self._layers: dict[str, str] = {}
        self._past: list[dict[str, Tensor]] = []
        self._own: dict[str, Tensor] = {}

    def begin(self, base: nn.Module, stage: Stage) -> Any:
        model = super().begin(base, stage)
        named = model.named_modules()
        self._stage, self._own = stage.name, {}
        self._layers = {path: layer.name for path, layer in named if isinstance(layer, LowRankLayer)}
        self._past = [
            read_tensors(known.folder / IMPORTANT, "The important entries") for known in stage.past.values()
        ]
        return model

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"regularisation": self.options.strength}

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        if not self._past or not self.options.strength:
            return {}
        terms = []
        for path, name in self._layers.items():
            a, b = (values[f"{path}.lowrank_{side}.{self._stage}.weight"] for side in "AB")
            # On the parameters' device from the first step on; the masks of a linear are used once a step.
            for stage in self._past:
                stage[name] = stage[name].to(a.device)
            terms.append(important_mean(a, b, [stage[name] for stage in self._past]))
        return {"regularisation": torch.stack(terms).mean()}

    def finish(self, model: Any, passes: Passes, reduce: Reduce) -> None:
        for path, name in self._layers.items():
            a, b = model.get_submodule(path).pair(self._stage)
            self._own[name] = packed(largest(b.detach() @ a.detach(), self.options.share)).cpu()

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        save_file(self._own, folder / IMPORTANT)

    def footprint(self, base: nn.Module) -> Footprint:
        sides = adapted_linears(base, self.backbone).values()
        stored = sum(d_out * ceil(d_in / 8) for d_in, d_out in sides)
        return replace(super().footprint(base), stored_bytes=stored)


def important_mean(a: Tensor, b: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Σ_ij m_ij |(B A)_ij| / Σ_ij m_ij, where m_ij is the number of masks that have the entry.

    Args:
        a: r×d_in; b: d_out×r.
        masks: bits of d_out×d_in entries, as `packed` gives them.
    """
    found: Tensor = _ImportantMean.apply(a, b, *masks)
    return found


class _ImportantMean(torch.autograd.Function):
    """Value and gradient in one pass over blocks of rows: neither B A nor its gradient is ever whole."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *masks: Tensor) -> Tensor:
        step = max(1, ENTRIES // a.shape[1])
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        total, count = a.new_zeros(()), a.new_zeros((), dtype=torch.float64)
        for start in range(0, len(b), step):
            rows = slice(start, start + step)
            times = torch.stack([unpacked(mask[rows], a.shape[1]) for mask in masks]).sum(0).to(a.dtype)
            update = b[rows] @ a
            slope = times * update.sign()
            total, count = total + (slope * update).sum(), count + times.sum(dtype=torch.float64)
            grad_b[rows] = slope @ a.T
            grad_a += b[rows].T @ slope
        share = (1 / count.clamp(min=1)).to(a.dtype)
        ctx.save_for_backward(grad_a * share, grad_b * share)
        return total * share

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_a, grad_b = ctx.saved_tensors
        masks = len(ctx.needs_input_grad) - 2
        return gradients[0] * grad_a, gradients[0] * grad_b, *([None] * masks)


def largest(update: Tensor, share: float) -> Tensor:
    """Which entries are among the `share` largest in size, at least one: bool, shaped as `update`."""
    count = max(1, round(share * update.numel()))
    chosen = torch.zeros(update.numel(), dtype=torch.bool, device=update.device)
    chosen[update.abs().flatten().topk(count).indices] = True
    return chosen.view(update.shape)


def packed(mask: Tensor) -> Tensor:
    """Bool n×d as uint8 n×⌈d/8⌉, the first entry in the lowest bit."""
    bits = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (bits << _places(mask)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, width: int) -> Tensor:
    """The uint8 n×width of zeros and ones that `packed` had."""
    return (bits.unsqueeze(-1) >> _places(bits) & 1).flatten(1)[:, :width]


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


METHOD = RegLora
