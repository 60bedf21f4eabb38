"""`olora`: a new LoRA for every task, whose input directions are kept away from those of earlier ones.

Source: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning (O-LoRA), Findings of
EMNLP 2023. Specification: baselines, "O-LoRA"; newer_methods, section 14.

    y = W₀x + s Σ_{i≤t} B_i A_i x,     L = CE + λ Σ_linears Σ_{i<t} Σ_{jk} |(A_t A_iᵀ)_jk|

Earlier pairs are frozen and act, in training as at test; `norm=squared` takes the squares of the products.

needs_task: no; encoders: none; mergeable: yes (a sum of pairs); bytes per task: 4·r·(d_in + d_out) per
linear, and the rank that acts grows by r with every task. Faithful, without the paper's optional l2 term on
the new pair. Not reproduced: both known ports train with the new pair alone, although all of them answer, and
one leaves the earlier A trainable, so that the penalty moves them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.own import TENSORS
from delo_llava.methods._lora import bare
from delo_llava.methods._lowrank import LowRankMethod, LowRankOptions
from delo_llava.methods.base import Capabilities, Clock, Footprint, Past, Stage
from delo_llava.strict import read_tensors

#: What the names of the matrices A hold.
A = ".lowrank_A."


class OLoraOptions(LowRankOptions):
    """Options of O-LoRA.

    Attributes:
        strength: λ.
        norm: of the products of new and earlier rows of A: the sum of their absolute values or squares.
    """

    strength: float = Field(0.5, ge=0)
    norm: Literal["absolute", "squared"] = "absolute"


class OLora(LowRankMethod):
    """A growing sum of pairs."""

    capabilities = Capabilities(mergeable=True)
    Config = OLoraOptions

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._name, self._earlier = stage.name, earlier_rows(list(stage.past.values()))
        model: nn.Module = self.beside(base, stage.past, stage.name)
        return model

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        model: nn.Module = self.opened(base, past) if past else bare(base)
        return model

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"orthogonality": self.options.strength}

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        if not self._earlier:
            return {}
        terms = []
        for name, value in values.items():
            if A in name:
                linear = name.partition(A)[0]
                self._earlier[linear] = self._earlier[linear].to(value)  # moved once
                terms.append(overlap(value, self._earlier[linear], self.options.norm))
        return {"orthogonality": torch.stack(terms).sum()}

    def footprint(self, base: nn.Module) -> Footprint:
        return replace(super().footprint(base), every_task=True)


def earlier_rows(past: Sequence[Past]) -> dict[str, Tensor]:
    """The rows of all published A of each linear, below each other: Σr×d_in; empty without a past."""
    files = [read_tensors(stage.folder / TENSORS, "An earlier adapter") for stage in past]
    names = {name.partition(A)[0]: name for name in (files[0] if files else {}) if A in name}
    return {linear: torch.cat([tensors[name] for tensors in files]) for linear, name in names.items()}


def overlap(new: Tensor, earlier: Tensor, norm: str) -> Tensor:
    """Σ |A_t A_iᵀ| or Σ (A_t A_iᵀ)² over the r×Σr products of rows, a scalar."""
    products = new @ earlier.T
    return products.abs().sum() if norm == "absolute" else products.square().sum()


METHOD = OLora
