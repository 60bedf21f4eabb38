"""Second moments in 16 bits: how far they are off, that nothing drifts, what old files are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from delo_llava.features.moments import moment_bytes, pack, pack_half, unpack, unpack_half
from delo_llava.features.queries import Queries
from delo_llava.features.ridge import RidgeStatistics
from delo_llava.features.task_keys import TaskKeyMemory

#: Half a step of 16 bits.
STEP = 0.5 / 32767


def scatter(width: int, rows: int, scale: float = 1.0) -> torch.Tensor:
    """Of rows whose dimensions have very unlike spreads."""
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).double()
    drawn = scale * drawn * torch.logspace(0, -3, width, dtype=torch.float64)
    return drawn.T @ drawn


@pytest.mark.parametrize(("width", "rows", "scale"), [(5, 3, 1.0), (64, 1000, 1e-4), (64, 20, 1e6)])
def test_a_half_is_off_by_half_a_step_of_its_deviations(width: int, rows: int, scale: float) -> None:
    exact = scatter(width, rows, scale)
    half, deviation = pack_half(exact)
    found = unpack_half(half, deviation)
    assert half.dtype == torch.int16 and half.shape == (width * (width + 1) // 2,)
    assert half.nbytes + deviation.nbytes == moment_bytes(width)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-14, atol=0)
    assert bool(((found - exact).abs() <= 1.001 * STEP * torch.outer(deviation, deviation)).all())


def test_what_was_stored_once_is_stored_alike_again() -> None:
    half, deviation = pack_half(scatter(40, 100))
    again, same = pack_half(unpack_half(half, deviation))
    assert torch.equal(again, half)
    torch.testing.assert_close(same, deviation, rtol=1e-15, atol=0)


def test_a_dimension_that_never_varies_is_zero_and_harms_none() -> None:
    exact = scatter(6, 50)
    exact[2], exact[:, 2] = 0, 0
    found = unpack_half(*pack_half(exact))
    assert not found[2].any() and torch.isfinite(found).all()


def test_products_of_two_sets_keep_their_sides_apart() -> None:
    left, right = torch.randn(30, 4).double(), 1e3 * torch.randn(30, 4).double()
    exact, deviations = left.T @ right, (left.square().sum(0).sqrt(), right.square().sum(0).sqrt())
    found = unpack(pack(exact, *deviations), *deviations)
    assert bool(((found - exact).abs() <= 1.001 * STEP * torch.outer(*deviations)).all())


def queries(rows: int, width: int, seed: int, at: float) -> tuple[Queries, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    drawn = (at + torch.randn(rows, width, generator=made) for _ in range(3))
    return Queries(*drawn), torch.ones(rows, 2, dtype=torch.bool)


def test_stored_keys_choose_as_exact_ones_do(tmp_path: Path) -> None:
    """Where tasks lie so near that many samples are taken for another's, only the narrowest choices differ:
    3,000 samples, width 256, twice as many rows as dimensions."""
    width, exact, found = 256, TaskKeyMemory(256), TaskKeyMemory(256)
    for number in range(3):
        exact.observe(f"t{number}", *queries(512, width, number, 0.1 * number))
        exact.settle(f"t{number}")
        (tmp_path / f"t{number}").mkdir()
        exact.save_task(tmp_path / f"t{number}", f"t{number}")
    found.load({task: tmp_path / task for task in exact.tasks})
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert stored < 3 * (3 * moment_bytes(width) + 3 * 8 * width + 1000)
    right, differing = 0.0, 0
    for number in range(3):
        test, presence = queries(1000, width, 10 + number, 0.1 * number)
        tasks, both = list(exact.tasks), (exact, found)
        ours = [memory.choose(test, presence, tasks, "lda", ["image"])[0] for memory in both]
        right += (ours[0] == number).double().mean().item() / 3
        differing += int((ours[0] != ours[1]).sum())
    assert 0.6 < right < 0.95, "the tasks are neither apart nor alike"
    assert differing <= 3


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    memory = TaskKeyMemory(8)
    given = queries(40, 8, 0, 0.0)
    memory.observe("t", *given)
    memory.settle("t")
    save_file(memory.tasks["t"].tensors(), tmp_path / TaskKeyMemory.FILE)
    old = TaskKeyMemory(8)
    old.load({"t": tmp_path})
    assert torch.equal(old.tasks["t"].scatter(1), memory.tasks["t"].scatter(1))
    ridge = RidgeStatistics.empty(8)
    ridge.observe(*given)
    save_file(ridge.tensors(), tmp_path / RidgeStatistics.FILE)
    assert torch.equal(RidgeStatistics.load(tmp_path).products, ridge.products)
