"""Pools of prompt components, mixed by attention to the query (CODA-Prompt), orthonormal at their start.

    prompt(q; layer) = Σ_k w_k P_k,   w_k = cos(q ⊙ A_k, K_k)      (no softmax: a weight may be negative)

A task adds components of its own; those of earlier tasks stay as they are and go on being mixed.
"""

import torch
from torch import Tensor

from delo_llava.errors import DeloError
from delo_llava.methods._prompts import Tensors

#: Keeps the cosine of a sample without a query at zero, and its gradient finite.
SMALLEST = 1e-6


def attention(query: Tensor, pool: Tensors) -> Tensor:
    """w, R×layers×n, of queries R×d over keys K and attention vectors A, n×layers×d each.

    The products q ⊙ A of all components are never made: Σ_d q·(A·K) over the root of Σ_d q²·A².
    """
    keys = torch.nn.functional.normalize(pool["keys"], dim=-1, eps=SMALLEST)
    weighed = torch.einsum("rd,nld->rln", query, pool["attention"] * keys)
    squares = torch.einsum("rd,nld->rln", query.square(), pool["attention"].square())
    return weighed / squares.clamp(min=SMALLEST**2).sqrt()


def mixed_prompts(query: Tensor, pool: Tensors) -> Tensor:
    """Σ_k w_k P_k for every row: R×layers×…, of P n×layers×…."""
    return torch.einsum("rln,nl...->rl...", attention(query, pool), pool["prompts"])


def fresh_components(
    count: int, shape: tuple[int, ...], width: int, earlier: Tensors | None
) -> dict[str, Tensor]:
    """`count` components at their start: P, K and A each have rows of length one at every layer, orthogonal
    to each other and to those of earlier tasks.

    Args:
        shape: of one prompt, its layers first. width: d of a query.
        earlier: the components there are.
    """
    layers = shape[0]
    shapes = {"prompts": shape, "keys": (layers, width), "attention": (layers, width)}
    before = dict.fromkeys(shapes) if earlier is None else earlier
    return {name: orthonormal(count, one, before[name]) for name, one in shapes.items()}


def orthonormal(count: int, shape: tuple[int, ...], earlier: Tensor | None) -> Tensor:
    """count×shape, fp32: at each index of the first dimension of `shape`, orthonormal rows that are
    orthogonal to the rows of `earlier` (m×shape) there. Drawn from N(0, 1) on the CPU.

    Raises:
        DeloError: there is no room for so many.
    """
    width, before = torch.Size(shape[1:]).numel(), 0 if earlier is None else len(earlier)
    if before + count > width:
        raise DeloError(
            "There is no room for further orthogonal prompt components",
            given=f"{before} there are and {count} more, in {width} dimensions",
            fix="fewer components per task, or longer prompts",
        )
    drawn = torch.randn(shape[0], width, count, dtype=torch.float64)
    if earlier is None:
        there = drawn.new_zeros(shape[0], width, 0)
    else:
        there = earlier.detach().cpu().double().reshape(before, shape[0], width).permute(1, 2, 0)
    rows = [torch.linalg.qr(torch.cat(pair, 1)).Q[:, before:].T for pair in zip(there, drawn, strict=True)]
    return torch.stack(rows, 1).reshape(count, *shape).float()
