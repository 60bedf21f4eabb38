"""Experts that share one low-rank pair, read as blocks, and a linear router that weights them for each token.

With E experts of rank ρ, A (Eρ×d_in) holds expert e's A_e in rows eρ…(e+1)ρ and B (d_out×Eρ) its B_e in those
columns: y = W₀x + s·Σ_e g_e(x) B_e A_e x is one product down, a weight on each block, one product up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError
from delo_llava.methods._lowrank import ADAPTER, LowRankMethod, LowRankOptions
from delo_llava.methods.base import Past, Stage


class ExpertOptions(LowRankOptions):
    """Options of every method with token-routed experts.

    Attributes:
        experts: that share the rank of each pair; the rank is a multiple of their number.
        top_k: experts with the largest weights that act on a token, whose weights are scaled to sum to one;
            0: all of them act. With one, the function is the plain choice, and the router learns from the
            softmax's gradient (straight-through): a softmax over one value is the constant 1, without any.
    """

    experts: int = Field(4, ge=1)
    top_k: int = Field(0, ge=0)


class TokenExperts(LowRankMethod):
    """One pair and one router per adapted linear, trained through all tasks."""

    Config = ExpertOptions

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.multiple = self.outputs = options.experts
        check_experts(options)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        if stage.past:
            return self.continued(base, stage.past, self.mix)  # type: ignore[no-any-return]
        return self.fresh(base, ADAPTER, self.mix)  # type: ignore[no-any-return]

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        return self.opened(base, past, self.mix, only_last=True)  # type: ignore[no-any-return]

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """s·Σ_e g_e(x) B_e A_e x for every token."""
        gate = gates(layer.scores(ADAPTER, x), self.options.top_k)
        self.routed(layer, gate)
        return layer.up(ADAPTER, weighted(layer.down(ADAPTER, x), gate))

    def routed(self, layer: LowRankLayer, gate: Tensor) -> None:
        """Told the weights of each token, …×E; a recomputed forward tells the same once more."""
        return None


def check_experts(options: Any) -> None:
    """Options of experts that share a pair's rank, some of which act.

    Raises:
        DeloError: more of them are to act than there are, or they cannot share the rank evenly.
    """
    given = f"rank={options.rank}, experts={options.experts}, top_k={options.top_k}"
    if options.top_k > options.experts:
        raise DeloError(
            "More experts cannot act than there are", given=given, fix="set top_k to at most experts"
        )
    if options.rank != "match" and options.rank % options.experts:
        raise DeloError(
            "The rank must be a multiple of the number of experts, who share it",
            given=given,
            fix="set rank to experts times the rank of one",
        )


def gates(scores: Tensor, top_k: int) -> Tensor:
    """The weights of the experts, …×E, which sum to one.

    Args:
        scores: the router's outputs, …×E.
        top_k: how many act; 0 or E: all. Ties go to the lower index. With one, the value is the choice and
            the gradient that of its softmax probability.
    """
    weights = scores.softmax(-1)
    if top_k in (0, scores.shape[-1]):
        return weights
    mask = largest(scores, top_k)
    kept = weights * mask
    return kept / kept.sum(-1, keepdim=True) if top_k > 1 else mask + (kept - kept.detach())


def largest(scores: Tensor, count: int) -> Tensor:
    """One for the `count` largest of …×E, zero for the others; ties go to the lower index."""
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores).scatter_(-1, chosen, 1.0)


def weighted(u: Tensor, gate: Tensor) -> Tensor:
    """Every block of `u` (…×Eρ) times its expert's weight (…×E)."""
    blocks = u.view(*u.shape[:-1], gate.shape[-1], -1) * gate.unsqueeze(-1)
    return blocks.flatten(-2)
