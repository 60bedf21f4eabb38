"""Second moments d×d as they are stored: correlations in 16 bits and standard deviations in float64.

A symmetric matrix keeps its upper half. At d = 4096 that is 17 MB (float64 in full: 134 MB). A correlation is
off by at most 1.6e-5, so the matrix by a random one of norm some 1e-3 of its diagonal at that width.
"""

import torch
from torch import Tensor

#: The number that stands for a correlation of one.
ONE = 32767


def pack(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Correlations of d×d `products` whose rows and columns have the deviations `left` and `right` (d each).

    Returns:
        int16 d×d; zero where a deviation is zero.
    """
    scaled = products / torch.outer(_divisor(left), _divisor(right))
    return (scaled.clamp(-1, 1) * ONE).round().to(torch.int16)


def unpack(stored: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The float64 matrix of `pack`."""
    return (stored.double() / ONE) * torch.outer(left, right)


def pack_half(products: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric d×d matrix as its upper half (int16, d(d + 1)/2, row by row) and deviations (float64 d)."""
    deviation = products.diagonal().clamp(min=0).sqrt()
    upper = torch.triu_indices(*products.shape, device=products.device)
    return pack(products, deviation, deviation)[upper[0], upper[1]], deviation


def unpack_half(half: Tensor, deviation: Tensor) -> Tensor:
    """The symmetric float64 matrix of `pack_half`; its diagonal is exact."""
    size = len(deviation)
    stored = torch.zeros(size, size, dtype=torch.int16)
    upper = torch.triu_indices(size, size)
    stored[upper[0], upper[1]] = half
    stored.T[upper[0], upper[1]] = half
    return unpack(stored, deviation, deviation)


def moment_bytes(width: int) -> int:
    """Bytes of what `pack_half` makes of a matrix of that width."""
    return width * (width + 1) + 8 * width


def _divisor(deviation: Tensor) -> Tensor:
    return torch.where(deviation > 0, deviation, 1.0)
