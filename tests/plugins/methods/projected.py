"""`projected`: one LoRA whose updates never enter a fixed subspace of each layer's input (what PRISM
needs)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from delo_llava.methods.base import Clock, Trained
from delo_llava.methods.lora import Lora

#: Directions of each layer's input that stay as they are.
KEPT = 4


def subspace(name: str, width: int) -> Tensor:
    """Orthonormal columns, width×KEPT, that belong to a parameter's name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    drawn = torch.randn(width, KEPT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


class Projected(Lora):
    """Δ ← Δ − ΔVVᵀ for every A, after the optimiser's step: Adam would leak through a projected gradient."""

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        new = {}
        for name, value in trained.values().items():
            if "lora_A" in name:
                basis = subspace(name, value.shape[1]).to(value.device)
                change = (value - before[name]).double()
                new[name] = (before[name].double() + change - change @ basis @ basis.T).float()
        trained.rewrite(new)


METHOD = Projected
