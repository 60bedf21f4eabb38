"""The mathematics of PRISM, as pure functions over tensors; a federated server and its clients use the same.

Gradients come as rows: of A (ρ×d_in) they are its own, of B (d_out×ρ) those of its transpose. An expert's
covariance M = Σ weight·RᵀR over steps (d×d) is never formed: a sketch S with few rows stands for it, SᵀS ≈ M.
Leading dimensions (experts) are batched throughout. A basis …×d×b has orthonormal columns, or zero ones where
fewer directions were seen than there is room for.

Source: PRISM (arXiv 2605.01061); equation numbers are those of the specification. What is exact and what is
bounded is proven in tests/unit/test_prism_subspace.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: A direction counts as seen if its singular value is at least this share of the largest one.
SEEN = 1e-6


class Union(NamedTuple):
    """A basis after a task (equation 3), and how well it holds what it was made of; all over leading
    dimensions.

    Attributes:
        basis: …×d×b; values: …×b, the eigenvalue of each direction, falling; both float64.
        cut: the largest eigenvalue that was left out.
        retained: share of all eigenvalues that was kept.
        residual: the largest part, squared, of an earlier direction that the new basis no longer holds.
        bound: what `residual` cannot exceed, from the eigenvalues alone.
    """

    basis: Tensor
    values: Tensor
    cut: Tensor
    retained: Tensor
    residual: Tensor
    bound: Tensor


def absorb(sketch: Tensor, rows: Tensor, size: int) -> Tensor:
    """A sketch that knows further rows: SᵀS grows by RᵀR, exactly, until 2·size rows are exceeded; then it is
    shrunk to `size` rows (`shrink`).

    Args:
        sketch: …×k×d; rows: …×n×d, already times the root of their weight.
    """
    both = torch.cat([sketch, rows.to(sketch)], -2)
    return both if both.shape[-2] <= 2 * size else shrink(both, size)


def shrink(rows: Tensor, size: int) -> Tensor:
    """Frequent Directions (Liberty 2013): at most `size` orthogonal rows, every eigenvalue less by the
    largest one that is left out, λ. So SᵀS ≤ RᵀR ≤ SᵀS + λ·I; with at most `size` directions it is exact.
    """
    if rows.shape[-2] <= size:
        return rows
    exact = rows.double()
    values, vectors = torch.linalg.eigh(exact @ exact.mT)
    values = values.clamp(min=0)
    kept, lost = values[..., -size:], values[..., -size - 1, None]
    factor = torch.where(
        kept > 0, (kept - lost) / kept.clamp(min=torch.finfo(torch.float64).tiny), 0.0
    ).sqrt()
    turned: Tensor = factor.unsqueeze(-1) * (vectors[..., -size:].mT @ exact)
    return turned.to(rows.dtype)


def local_factor(sketch: Tensor, budget: int) -> Tensor:
    """F = U_b·diag(√λ_b) of a covariance (equation 2): what a client tells of its task, …×d×b."""
    left, singular, _ = torch.linalg.svd(sketch.double().mT, full_matrices=False)
    factor: Tensor = left[..., :budget] * singular[..., None, :budget]
    return factor


def union(
    basis: Tensor, values: Tensor, factors: Sequence[Tensor], weights: Sequence[float], budget: int
) -> Union:
    """The basis of the mixture covariance of everything so far (equation 3): the thin SVD of
    [V·√λ | √w_1·F_1 | …], cut to `budget` columns.

    Args:
        basis: …×d×b and values: …×b, of before; b may be 0.
        factors: of the clients, …×d×·; weights: their shares of the examples.
    """
    basis, values = basis.double(), values.double()
    parts = [factor.double() * weight**0.5 for factor, weight in zip(factors, weights, strict=True)]
    stacked = torch.cat([basis * values.sqrt().unsqueeze(-2), *parts], -1)
    left, singular, _ = torch.linalg.svd(stacked, full_matrices=False)
    energy = singular**2
    seen = (singular > SEEN * singular[..., :1])[..., :budget]
    new, kept = left[..., :budget] * seen.unsqueeze(-2), energy[..., :budget] * seen
    cut = energy[..., budget] if energy.shape[-1] > budget else torch.zeros_like(energy[..., 0])
    retained = kept.sum(-1) / energy.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    residual, bound = _carried(basis, values, new, energy[..., 0], cut)
    return Union(new, kept, cut, retained, residual, bound)


def _carried(basis: Tensor, values: Tensor, new: Tensor, first: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """How much of an earlier direction the new basis no longer holds, and what the eigenvalues promise.

    For an earlier v: λ ≤ vᵀMv ≤ λ_1·(1 − residual) + cut·residual.
    """
    old = values > 0
    if not basis.shape[-1] or not bool(old.any()):
        return torch.zeros_like(cut), torch.zeros_like(cut)
    lost = (((basis - new @ (new.mT @ basis)) ** 2).sum(-2) * old).amax(-1)
    least = values.masked_fill(~old, torch.inf).amin(-1)
    held = (least > cut) & least.isfinite()
    bound = ((first - least) / (first - cut).clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return lost, torch.where(held, bound, torch.ones_like(bound))


def projected(change: Tensor, basis: Tensor, strength: float) -> Tensor:
    """Δ ← Δ − s·(ΔV)Vᵀ (equation 4), for the rows of a change, …×ρ×d; both sides of a pair use it."""
    return change - strength * (change @ basis) @ basis.mT


def interference(rows: Tensor, basis: Tensor, mass: Tensor) -> Tensor:
    """The sums of which γ is the quotient (equation 5): Σ_e mass_e·‖G_e V_e‖² and Σ_e mass_e·‖G_e‖².

    Args:
        rows: gradients before any projection, E×ρ×d; basis: E×d×b; mass: E.

    Returns:
        Two float64 values.
    """
    rows, mass = rows.double(), mass.double()
    inside = ((rows @ basis.to(rows)) ** 2).sum((-2, -1))
    return torch.stack([(mass * inside).sum(), (mass * (rows**2).sum((-2, -1))).sum()])


def effective_rank(rows: Tensor, threshold: float) -> int:
    """How many eigenvalues of RᵀR (rows n×d) are at least `threshold` times the largest (equation 6)."""
    exact = rows.double()
    small = exact @ exact.T if len(exact) <= exact.shape[1] else exact.T @ exact
    values = torch.linalg.eigvalsh(small)
    return int((values >= threshold * values[-1]).sum()) if float(values[-1]) > 0 else 0


def water_fill(weights: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Whole shares of `total` proportional to `weights`, none above its cap (equation 7).

    What a cap cuts off is dealt again among the others; those of weight zero share equally what then is
    left. Fractions go to the largest remainders, ties to the first. The shares sum to `total`, or to the
    caps' sum if that is less.
    """
    left = min(total, sum(caps))
    shares = [0.0] * len(caps)
    open_ = [i for i, cap in enumerate(caps) if cap > 0]
    while open_ and left > 0:
        whole = sum(weights[i] for i in open_)
        wanted = {i: left * (weights[i] / whole if whole > 0 else 1 / len(open_)) for i in open_}
        full = [i for i in open_ if wanted[i] >= caps[i]]
        if not full:
            shares = [wanted.get(i, share) for i, share in enumerate(shares)]
            break
        for i in full:
            shares[i], left = float(caps[i]), left - caps[i]
        open_ = [i for i in open_ if i not in full]
    floors = [int(share) for share in shares]
    spare = min(total, sum(caps)) - sum(floors)
    order = sorted((i for i in range(len(caps)) if floors[i] < caps[i]), key=lambda i: floors[i] - shares[i])
    given = set(order[:spare])
    return [floor + (i in given) for i, floor in enumerate(floors)]
