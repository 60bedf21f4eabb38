"""The module that an engine trains: a method's loss, with every trainable parameter in every graph."""

from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.data.collate import Batch
from delo_llava.methods.base import Method


class MethodModule(nn.Module):
    """Forward gives the method's loss sums of one micro-batch.

    Args:
        touch_all: give every trainable parameter a gradient, zero where the batch does not use it, and let
            all of them arrive in one order. ZeRO 1 and 2 put gradients into buckets as they come and add the
            ranks' buckets: if one rank's batch has no image, its projector would send none, or at another
            time, and gradients of different parameters would be added up. (Not for ZeRO-3, whose parameters
            are empty between uses.)
    """

    def __init__(self, model: nn.Module, method: Method, touch_all: bool) -> None:
        super().__init__()
        self.model = model
        self.method, self.touch_all = method, touch_all

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of each loss term of `batch` (scalars)."""
        if not self.touch_all:
            return self.method.loss_sums(self.model, batch)
        # Made before the forward pass, so autograd, which runs what was made last first, comes to it at the
        # very end; until then every parameter waits for it, and then they all arrive in the order given here.
        nothing: Tensor = _Touch.apply(*(p for p in self.model.parameters() if p.requires_grad))
        sums = self.method.loss_sums(self.model, batch)
        term = next(iter(sums))
        return sums | {term: sums[term] + nothing}


class _Touch(torch.autograd.Function):
    """Zero, with a zero gradient for every parameter."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.new_zeros(()).expand(p.shape) for p in ctx.parameters)
