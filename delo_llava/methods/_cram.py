"""CRAM's arithmetic: which group of tasks a task belongs to, and what of a buffer's update becomes a slot."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def centred(queries: Tensor) -> Tensor:
    """z: a layer norm without scale or shift over each query, …×d."""
    return F.layer_norm(queries, queries.shape[-1:])


def group_of(task: Tensor, prototypes: Tensor, join: float, margin: float, most: int) -> int:
    """The group that a task joins, the number of groups for a new one.

    Args:
        task: its mean z, d; prototypes: of the groups, G×d.
        join: with one group, a cosine above this joins it.
        margin: with more, the nearest one is joined if its cosine is this much above the next one's.
        most: groups there may be; at that number, the nearest one is joined anyway.
    """
    count = len(prototypes)
    if count == 0:
        return 0
    cosines = F.cosine_similarity(task.unsqueeze(0), prototypes, dim=-1)
    near = cosines.sort(descending=True, stable=True)
    clear = near.values[0] > join if count == 1 else near.values[0] - near.values[1] > margin
    return int(near.indices[0]) if bool(clear) or count >= most else count


@dataclass(frozen=True)
class Cut:
    """How a buffer's update is cut down to a slot.

    Attributes:
        rank: of the slot at most; least: directions it has at least, as far as the update has them.
        strength: singular values up to this are left out.
        novelty: of a direction's length, the share that lies outside what earlier slots read.
    """

    rank: int
    least: int
    strength: float
    novelty: float


def slot_of(down: Tensor, up: Tensor, scale: float, basis: Tensor | None, cut: Cut) -> tuple[Tensor, Tensor]:
    """A (rank×d_in) and B (d_out×rank) of a slot with scale·B A ≈ scale·up·down, its rows outside `basis`.

    Directions that are left out are zero in both. In float64 on the CPU, so that every rank makes the same.

    Args:
        down, up: the buffer's A, R×d_in, and B, d_out×R.
        basis: orthonormal rows, k×d_in, of what the group's earlier slots read; None: there are none.
    """
    q_out, r_out = torch.linalg.qr(up.double().cpu())
    q_in, r_in = torch.linalg.qr(down.double().cpu().T)
    u, sigma, v = torch.linalg.svd(scale * r_out @ r_in.T)
    left, right = q_out @ u, v @ q_in.T
    # Either sign of a pair of singular vectors is right; which one must not hang on rounding.
    largest = right.abs().argmax(1, keepdim=True)
    sign = right.gather(1, largest).sign()
    left, right = left * sign.T, right * sign
    outside = right if basis is None else right - right @ basis.double().cpu().T @ basis.double().cpu()
    novelty = outside.norm(dim=1) / right.norm(dim=1).clamp(min=1e-300)
    chosen = _chosen(sigma, novelty, cut)
    a, b = torch.zeros(cut.rank, down.shape[1]), torch.zeros(up.shape[0], cut.rank)
    rows = F.normalize(outside[chosen], dim=1) * sigma[chosen].sqrt().unsqueeze(1)
    a[: len(chosen)] = rows.float()
    b[:, : len(chosen)] = (left[:, chosen] * sigma[chosen].sqrt() / scale).float()
    return a, b


def _chosen(sigma: Tensor, novelty: Tensor, cut: Cut) -> list[int]:
    """The strong directions that are new; where these are too few, the ones of most strength outside."""
    strong = [i for i in range(len(sigma)) if float(sigma[i]) > cut.strength][: cut.rank]
    chosen = [i for i in strong if float(novelty[i]) > cut.novelty]
    spare = sorted(set(range(len(sigma))) - set(chosen), key=lambda i: -float(sigma[i] * novelty[i]))
    real = [i for i in spare if float(sigma[i]) > 0 and float(novelty[i]) > 1e-6]
    return chosen + real[: max(0, min(cut.least, cut.rank) - len(chosen))]


def basis_of(downs: Sequence[Tensor]) -> Tensor | None:
    """Orthonormal rows that span the rows of some A's, k×d_in; rows of zeros are no direction."""
    if not downs:
        return None
    rows = torch.cat([down.double().cpu() for down in downs])
    _, sigma, v = torch.linalg.svd(rows, full_matrices=False)
    kept = sigma > 1e-6 * sigma.max().clamp(min=1e-300)
    return v[kept] if bool(kept.any()) else None
