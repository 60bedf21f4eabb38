"""The module that an engine trains: a method's loss, with every trainable parameter in every graph."""

from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.data.collate import Batch
from delo_llava.methods.base import Method


class MethodModule(nn.Module):
    """Forward gives the method's loss sums of one micro-batch.

    Args:
        touch_all: give every trainable parameter a gradient, zero where the batch does not use it. ZeRO 1 and
            2 reduce gradients in the order they arrive: if one rank's batch has no image, its projector would
            send none, and the ranks' collectives would no longer match. In one process AdamW would skip such
            a parameter, where ZeRO moves it by its momentum. (Not for ZeRO-3, whose parameters are empty
            between uses, and which counts a missing gradient as zero itself.)
    """

    def __init__(self, model: nn.Module, method: Method, touch_all: bool) -> None:
        super().__init__()
        self.model = model
        self.method, self.touch_all = method, touch_all

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of each loss term of `batch` (scalars)."""
        sums = self.method.loss_sums(self.model, batch)
        if self.touch_all:
            term = next(iter(sums))
            trained = [p for p in self.model.parameters() if p.requires_grad]
            sums = sums | {term: _Touch.apply(sums[term], *trained)}
        return sums


class _Touch(torch.autograd.Function):
    """The identity of its first input; the others receive a zero gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0], *(p.new_zeros(()).expand(p.shape) for p in ctx.parameters))
