"""SAME's arithmetic: what directions a linear's inputs vary in, and how an update is bent by them."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

#: Eigenvalues below this share of the largest are rounding (products are fp32).
SEEN = 1e-5
#: Of the squared spread, the share that the router's directions hold.
HELD = 0.9
#: What a router's direction is scaled by, at least and at most.
LEAST, MOST = 0.8, 1.2


class Spectrum(NamedTuple):
    """Orthonormal directions d×k in which a linear's inputs vary, the widest first, and their spread k (a
    standard deviation); float64. None of them (k = 0) before there are two tokens.
    """

    directions: Tensor
    spread: Tensor


def probe(inputs: int, width: int, seed: int) -> Tensor:
    """Q: `width` random orthonormal directions of a linear's input (all of them where it has fewer), float64
    on the CPU.
    """
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(inputs, min(width, inputs), generator=draw, dtype=torch.float64)
    found: Tensor = torch.linalg.qr(drawn).Q
    return found


@dataclass
class Moments:
    """Sums over tokens x: Σ x xᵀQ (d×k), Σ x (d) and how many. They add up over batches, ranks and tasks."""

    products: Tensor
    sums: Tensor
    count: Tensor

    @classmethod
    def empty(cls, inputs: int, width: int) -> Self:
        """Of no token yet."""
        zeros = torch.zeros(inputs, min(width, inputs) + 1, dtype=torch.float64)
        return cls(zeros[:, :-1].clone(), zeros[:, -1].clone(), torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, tokens: Tensor, known: Tensor) -> Self:
        """Of n×d tokens, by the probe `known`."""
        rows = tokens.float()
        count = torch.tensor(float(len(rows)), dtype=torch.float64)
        return cls(rows.T @ (rows @ known.to(rows)), rows.sum(0), count)

    def add(self, other: "Moments") -> None:
        """Sum in float64, where the other's tensors lie."""
        self.products = self.products.to(other.products.device) + other.products
        self.sums = self.sums.to(other.sums.device) + other.sums
        self.count = self.count + other.count

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {"products": self.products, "sums": self.sums, "count": self.count}

    def spectrum(self, known: Tensor) -> Spectrum:
        """Directions and spreads of the covariance C, from C·Q alone (Nyström: C ≈ CQ (QᵀCQ)⁺ QᵀC), which is
        exact where C's rank is no larger than the probe's.
        """
        count, known = float(self.count), known.to(self.products)
        reach = self.products - torch.outer(self.sums, self.sums @ known) / max(1.0, count)
        core = known.T @ reach
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        seen = values > SEEN * values.abs().max()
        if count < 2 or not bool(seen.any()):
            return Spectrum(known[:, :0], values[:0])
        root = reach @ vectors[:, seen] / values[seen].sqrt()
        directions, found, _ = torch.linalg.svd(root, full_matrices=False)
        # In the order in which a checkpoint gives it back: a product's last bits depend on it.
        return Spectrum(directions.contiguous(), found / (count - 1) ** 0.5)


def curved(change: Tensor, past: Spectrum, damping: float) -> Tensor:
    """Δ U diag(1/(S + μ)) Uᵀ + Δ(I − UUᵀ)/μ of an update …×d: short where earlier inputs spread."""
    basis, inside = past.directions.to(change), change @ past.directions.to(change)
    share = (1 / (past.spread + damping) - 1 / damping).to(change)
    return change / damping + (inside * share) @ basis.T


def spectral(change: Tensor, seen: Spectrum) -> Tensor:
    """An update of a router, …×d, scaled along the widest directions that hold `HELD` of the squared spread.

    With S̄ the mean of a spread and the two before it, a direction's scale is (1/S̄ over its maximum), between
    `LEAST` and `MOST`: so none is above one.
    """
    if not len(seen.spread):
        return change
    squares = seen.spread.square()
    count = min(len(squares), 1 + int((squares.cumsum(0) / squares.sum() <= HELD).sum()))
    spread, basis = seen.spread[:count], seen.directions[:, :count].to(change)
    smooth = torch.stack([spread[max(0, i - 2) : i + 1].mean() for i in range(count)])
    scale = (smooth.min() / smooth).clamp(LEAST, MOST).to(change)
    return change + (change @ basis * (scale - 1)) @ basis.T


def acting(load: Tensor, energy: Tensor, own: int, threshold: float) -> Tensor:
    """Which experts act, bool L×E: those whose share of the load is larger than of the energy, by `threshold`
    of each one's range, and the task's own.

    Args:
        load: mean weights u, L×E; energy: weights times squared lengths v, L×E.
    """
    found = _ranged(load) - _ranged(energy) >= threshold
    found[:, own] = True
    return found


def _ranged(values: Tensor) -> Tensor:
    """Each row from 0 to 1; zeros where all are equal."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
