"""PRISM's mathematics against dense float64 references, and the specification's invariants I1 to I11, I14."""

import math
import random

import pytest
import torch
from torch import Tensor

from delo_llava.methods.prism.subspace import (
    absorb,
    effective_rank,
    interference,
    local_factor,
    projected,
    shrink,
    union,
    water_fill,
)

D, RHO, EXPERTS = 40, 3, 2
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def empty() -> tuple[Tensor, Tensor]:
    """No basis yet."""
    return torch.zeros(EXPERTS, D, 0, dtype=F64), torch.zeros(EXPERTS, 0, dtype=F64)


def gram(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def low_rank_factor(columns: int) -> Tensor:
    """A random factor with falling, well separated eigenvalues."""
    return torch.linalg.qr(draw(EXPERTS, D, columns)).Q * torch.logspace(0, -1, columns, dtype=F64)


# ---- streaming covariances
def test_a_sketch_of_few_directions_is_exact() -> None:
    """Forty steps within five directions, shrunk many times, weighted by their mass."""
    inside = torch.linalg.qr(draw(EXPERTS, D, 5)).Q
    dense, sketch = torch.zeros(EXPERTS, D, D, dtype=F64), torch.zeros(EXPERTS, 0, D, dtype=F64)
    for _ in range(40):
        rows, mass = draw(EXPERTS, RHO, 5) @ inside.mT, torch.rand(EXPERTS, dtype=F64)
        dense += mass[:, None, None] * gram(rows)
        sketch = absorb(sketch, rows * mass.sqrt()[:, None, None], 6)
        assert sketch.shape[1] <= 12
    assert torch.allclose(gram(sketch), dense, rtol=1e-10, atol=1e-10)


def test_a_sketch_of_many_directions_lies_within_its_bound() -> None:
    """0 ≤ M − SᵀS ≤ ‖M − M_k‖_F² / (size + 1 − k) for every k, which is what Frequent Directions promises."""
    steps = [draw(1, RHO, D) * torch.logspace(0, -2, D, dtype=F64) for _ in range(60)]
    size = 8
    sketch = torch.zeros(1, 0, D, dtype=F64)
    for rows in steps:
        sketch = absorb(sketch, rows, size)
    sketch = shrink(sketch, size)
    dense = torch.stack([gram(rows[0]) for rows in steps]).sum(0)
    assert sketch.shape == (1, size, D)
    left = torch.linalg.eigvalsh(dense - gram(sketch[0]))
    values = torch.linalg.eigvalsh(dense).flip(0)
    bound = min(float(values[k:].sum()) / (size + 1 - k) for k in range(size))
    assert float(left.min()) > -1e-9 * float(values[0])
    assert 0 < float(left.max()) <= bound < 0.5 * float(values[0])


def test_shrinking_takes_the_largest_lost_eigenvalue_from_all() -> None:
    rows = torch.diag(torch.tensor([5.0, 4, 3, 2, 1], dtype=F64))
    assert torch.allclose(gram(shrink(rows, 3)), torch.diag(torch.tensor([21.0, 12, 5, 0, 0], dtype=F64)))
    assert shrink(rows, 5) is rows


# ---- unions
def test_i1_bases_are_orthonormal_after_every_union() -> None:
    basis, values = empty()
    for _ in range(6):
        found = union(basis, values, [draw(EXPERTS, D, 9), draw(EXPERTS, D, 4)], [0.7, 0.3], 10)
        basis, values = found.basis, found.values
        assert float((basis.mT @ basis - torch.eye(10, dtype=F64)).abs().max()) < 1e-12
        assert bool((values.diff(dim=-1) <= 0).all()) and bool((values > 0).all())


def test_a_direction_that_nobody_has_is_not_protected() -> None:
    """Two seen, six asked for: the other columns are zero, not some direction."""
    found = union(*empty(), [low_rank_factor(2) @ draw(2, 8)], [1.0], 6)
    assert found.basis.shape == (EXPERTS, D, 6) and found.values.shape == (EXPERTS, 6)
    diagonal = (found.basis.mT @ found.basis).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(diagonal, torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=F64).expand(EXPERTS, 6))
    none = union(*empty(), [torch.zeros(EXPERTS, D, 3, dtype=F64)], [1.0], 2)
    assert none.basis.abs().sum() == 0 and none.values.abs().sum() == 0
    assert all(bool(part.isfinite().all()) for part in none)


def test_i8_one_client_without_past_gives_the_eigenbasis() -> None:
    rows = draw(EXPERTS, 12, D)
    found = union(*empty(), [local_factor(rows, 5)], [1.0], 5)
    values, vectors = torch.linalg.eigh(gram(rows))
    assert torch.allclose(found.values, values[:, -5:].flip(-1))
    assert torch.allclose(projector(found.basis), projector(vectors[..., -5:]), atol=1e-9)


def test_i9_neither_order_nor_split_of_clients_matters() -> None:
    old = union(*empty(), [low_rank_factor(4)], [1.0], 4)
    parts, weights = [low_rank_factor(6) for _ in range(3)], [0.5, 0.3, 0.2]
    plain = union(old.basis, old.values, parts, weights, 5)
    turned = union(old.basis, old.values, parts[::-1], weights[::-1], 5)
    halved = union(old.basis, old.values, [parts[0], *parts], [0.25, 0.25, 0.3, 0.2], 5)
    for other in (turned, halved):
        assert torch.allclose(projector(plain.basis), projector(other.basis), atol=1e-9)
        assert torch.allclose(plain.values, other.values)


def test_the_union_is_that_of_the_dense_mixture() -> None:
    old = union(*empty(), [low_rank_factor(4)], [1.0], 4)
    parts, weights = [low_rank_factor(6) for _ in range(2)], [0.6, 0.4]
    found = union(old.basis, old.values, parts, weights, 7)
    dense = (old.basis * old.values.unsqueeze(-2)) @ old.basis.mT
    dense = dense + sum(w * f @ f.mT for w, f in zip(weights, parts, strict=True))
    values, vectors = torch.linalg.eigh(dense)
    assert torch.allclose(projector(found.basis), projector(vectors[..., -7:]), atol=1e-9)
    assert torch.allclose(found.cut, values[..., -8])
    assert torch.allclose(found.retained, values[..., -7:].sum(-1) / values.sum(-1))
    kept = vectors[..., -7:]
    lost = ((old.basis - kept @ (kept.mT @ old.basis)) ** 2).sum(-2).amax(-1)
    assert torch.allclose(found.residual, lost) and bool((found.residual > 1e-3).all())


def test_i10_everything_kept_loses_nothing() -> None:
    old = union(*empty(), [low_rank_factor(4)], [1.0], 4)
    found = union(old.basis, old.values, [low_rank_factor(5)], [1.0], 9)
    assert torch.allclose(found.retained, torch.ones(EXPERTS, dtype=F64))
    assert float(found.residual.max()) < 1e-12


def test_what_is_lost_of_an_earlier_direction_stays_below_its_bound() -> None:
    held = 0
    for _ in range(30):
        old = union(*empty(), [low_rank_factor(3)], [1.0], 3)
        found = union(old.basis, old.values, [0.3 * low_rank_factor(8)], [1.0], random.randint(1, 8))
        assert bool((found.residual <= found.bound + 1e-9).all())
        held += int((found.bound < 1).sum())
    assert held > 10, "or the bound would say nothing"


# ---- projection
def basis_of(columns: int = 6) -> Tensor:
    return torch.linalg.qr(draw(EXPERTS, D, columns)).Q


def inside(rows: Tensor, basis: Tensor) -> float:
    """Share of the norm that lies within the basis."""
    return float((rows @ basis).norm() / rows.norm())


def test_i2_nothing_stays_inside_at_full_strength() -> None:
    rows, basis = draw(EXPERTS, RHO, D), basis_of()
    assert inside(rows, basis) > 0.2 and inside(projected(rows, basis, 1.0), basis) < 1e-12
    naive = torch.stack([r - r @ v @ v.T for r, v in zip(rows, basis, strict=True)])
    assert torch.allclose(projected(rows, basis, 1.0), naive)


def test_i7_twice_is_once_and_no_strength_is_nothing() -> None:
    rows, basis = draw(EXPERTS, RHO, D), basis_of()
    once = projected(rows, basis, 1.0)
    assert torch.allclose(projected(once, basis, 1.0), once, atol=1e-14)
    assert torch.equal(projected(rows, basis, 0.0), rows)
    half = projected(rows, basis, 0.5)
    assert torch.allclose((half @ basis), 0.5 * (rows @ basis))


def test_i6_the_product_does_not_change_between_protected_directions() -> None:
    """V_outᵀ(B'A' − BA)V_in = 0 for two bases of different widths; and it is no promise for the output:
    (B'A' − BA)V_in itself is not zero, but orthogonal to V_out.
    """
    wide = 24
    a, b = draw(RHO, D), draw(wide, RHO)
    inner, outer = torch.linalg.qr(draw(D, 6)).Q, torch.linalg.qr(draw(wide, 4)).Q
    new_a = a + projected(draw(RHO, D), inner, 1.0)
    new_b = b + projected(draw(RHO, wide), outer, 1.0).T
    change = new_b @ new_a - b @ a
    assert float((outer.T @ change @ inner).norm() / change.norm()) < 1e-12
    assert float((change @ inner).norm() / change.norm()) > 0.05
    loose = (b + draw(wide, RHO)) @ (a + draw(RHO, D)) - b @ a
    assert float((outer.T @ loose @ inner).norm() / loose.norm()) > 0.05, "or it would hold for anything"


def test_i14_two_large_subspaces_must_share_directions() -> None:
    """dim(S_i ∩ S_j) ≥ k_i + k_j − d: exactly 64 of 256 for 160 and 160; none are forced for small ones."""
    for k, shared in ((160, 64), (24, 0)):
        one, two = (torch.linalg.qr(draw(256, k)).Q for _ in range(2))
        cosines = torch.linalg.svdvals(one.T @ two)
        assert int((cosines > 1 - 1e-9).sum()) == shared == max(0, 2 * k - 256)


def test_interference_is_the_weighted_share_inside() -> None:
    rows, basis, mass = draw(EXPERTS, RHO, D), basis_of(), torch.tensor([0.9, 0.1], dtype=F64)
    sums = interference(rows, basis, mass)
    top = sum(
        float(mass[e]) * sum(float(r @ v) ** 2 for r in rows[e] for v in basis[e].T) for e in range(EXPERTS)
    )
    all_ = sum(float(mass[e]) * sum(float(r @ r) for r in rows[e]) for e in range(EXPERTS))
    assert sums.tolist() == pytest.approx([top, all_])
    assert float(interference(basis.mT, basis, mass).diff()) == pytest.approx(0.0, abs=1e-12)


def test_the_effective_rank_counts_what_is_not_negligible() -> None:
    rows = torch.diag(torch.tensor([10.0, 3.0, 0.4, 0.3, 0.0], dtype=F64)) @ torch.linalg.qr(draw(D, 5)).Q.T
    assert effective_rank(rows, 1e-3) == 3, "0.4² ≥ 1e-3·10² > 0.3²"
    assert effective_rank(draw(3 * D, D), 1e-3) == D
    assert effective_rank(torch.zeros(4, D), 1e-3) == 0


# ---- budgets
def test_i11_shares_sum_to_the_budget_within_their_caps() -> None:
    chance = random.Random(0)
    for _ in range(300):
        count = chance.randint(1, 12)
        caps = [chance.randint(0, 20) for _ in range(count)]
        weights = [chance.choice([0.0, chance.random() ** 4]) for _ in range(count)]
        total = chance.randint(0, sum(caps) + 5)
        shares = water_fill(weights, caps, total)
        assert sum(shares) == min(total, sum(caps))
        assert all(0 <= share <= cap for share, cap in zip(shares, caps, strict=True))


def test_i11_more_interference_never_gets_less() -> None:
    chance = random.Random(1)
    for _ in range(200):
        weights = sorted(chance.random() ** 3 for _ in range(8))
        shares = water_fill(weights, [9] * 8, chance.randint(0, 72))
        assert shares == sorted(shares)


def test_i11_equals_share_equally() -> None:
    assert water_fill([0.2] * 4, [10] * 4, 20) == [5] * 4
    assert water_fill([0.0] * 4, [10] * 4, 20) == [5] * 4
    assert water_fill([0.2] * 4, [10] * 4, 21) == [6, 5, 5, 5]


def test_shares_before_any_cap_are_proportional_and_the_rest_is_dealt_again() -> None:
    assert water_fill([1.0, 2.0, 3.0], [100] * 3, 60) == [10, 20, 30]
    assert water_fill([1.0, 2.0, 3.0], [100, 100, 24], 60) == [12, 24, 24]
    assert water_fill([0.0, 0.0, 3.0], [100, 100, 24], 60) == [18, 18, 24]
    assert math.fsum(water_fill([1.0, 1.0, 1.0], [5, 5, 5], 99)) == 15
