"""Metrics on a matrix computed by hand, on the tables CoIN and others print, and on the edges."""

import re

import numpy as np
import pytest

from delo_eval.metrics.base import Grid, metrics
from delo_llava.registry import load_plugin

NAN = float("nan")
#: Row = stage, column = task; the cells just above the diagonal are the next task before its training.
HAND = np.array([[80.0, 12.0, NAN], [70.0, 90.0, 33.0], [74.0, 60.0, 50.0]])
ZERO_SHOT = np.array([5.0, 10.0, 30.0])

#: CoIN, protocol A, LoRA and MoELoRA: scores right after each task's training, and after the last one.
COIN = {
    "lora": (
        [82.45, 49.99, 96.05, 56.40, 55.45, 31.27, 62.20, 57.08],
        [21.26, 28.74, 10.25, 36.78, 32.45, 0.83, 42.50, 57.08],
    ),
    "moelora": (
        [75.78, 51.73, 96.70, 59.42, 58.88, 37.50, 64.22, 60.08],
        [63.09, 38.63, 10.50, 37.38, 43.62, 0.59, 43.15, 60.08],
    ),
}


def value(name: str, grid: Grid, zero_shot: Grid | None = None) -> float | None:
    return load_plugin("metric", name)(grid, zero_shot)  # type: ignore[operator]


def published(method: str) -> Grid:
    """A matrix of which only the diagonal and the last row are known."""
    immediate, final = COIN[method]
    grid = np.full((len(final), len(final)), NAN)
    np.fill_diagonal(grid, immediate)
    grid[-1] = final
    return grid


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ap", (74 + 60 + 50) / 3),
        ("last", (74 + 60 + 50) / 3),
        ("maa", (80 + (70 + 90) / 2 + (74 + 60 + 50) / 3) / 3),
        ("mft", (80 + 90 + 50) / 3),
        ("forgetting", ((80 - 74) + (90 - 60)) / 2),
        ("forgetting_max", ((80 - 74) + (90 - 60)) / 2),
        ("bwt_T", ((74 - 80) + (60 - 90) + 0) / 3),
        ("bwt_Tm1", ((74 - 80) + (60 - 90)) / 2),
        ("fwt", ((12 - 10) + (33 - 30)) / 2),
    ],
)
def test_hand_matrix(name: str, expected: float) -> None:
    assert value(name, HAND, ZERO_SHOT) == pytest.approx(expected, abs=1e-12)


def test_every_metric_has_a_file_an_id_with_version_and_a_formula() -> None:
    found = metrics()
    assert {"ap", "last", "maa", "mft", "forgetting", "forgetting_max", "bwt_T", "bwt_Tm1", "fwt"} <= set(
        found
    )
    for name, metric in found.items():
        assert re.fullmatch(rf"{name}(\.\w+)?\.v\d+", metric.id) and metric.formula
    assert len({metric.id for metric in found.values()}) == len(found)


def test_ids_name_the_divisor_where_conventions_differ() -> None:
    found = metrics()
    for name in ("forgetting", "forgetting_max", "forgetting_max_all", "bwt_Tm1", "fwt"):
        assert "Tm1" in found[name].id and "1/(T-1)" in found[name].formula
    assert found["bwt_T"].formula.startswith("(1/T)")


def test_the_literal_maximum_counts_what_a_task_scored_before_its_training() -> None:
    grid = np.array([[80.0, 95.0, NAN], [70.0, 90.0, 33.0], [74.0, 60.0, 50.0]])
    assert value("forgetting_max", grid) == pytest.approx(((80 - 74) + (90 - 60)) / 2)
    assert value("forgetting_max_all", grid) == pytest.approx(((80 - 74) + (95 - 60)) / 2)
    assert value("forgetting_max_all", np.array([[80.0, NAN], [70.0, 90.0]])) == 10
    assert value("forgetting_max_all", np.array([[80.0]])) is None
    assert value("forgetting_max_all", np.where(np.tri(3, dtype=bool), HAND, NAN)) is None


@pytest.mark.parametrize(
    ("method", "acc", "new", "bwt_t"), [("lora", 28.74, 61.36, -32.62), ("moelora", 37.13, 63.04, -25.91)]
)
def test_coin_rows_as_published(method: str, acc: float, new: float, bwt_t: float) -> None:
    grid = published(method)
    assert value("ap", grid) == pytest.approx(acc, abs=0.006)
    assert value("mft", grid) == pytest.approx(new, abs=0.006)
    assert value("bwt_T", grid) == pytest.approx(bwt_t, abs=0.006)


def test_coin_lora_forgetting_as_pclr_prints_it() -> None:
    assert value("forgetting", published("lora")) == pytest.approx(37.29, abs=0.006)
    assert value("bwt_Tm1", published("lora")) == pytest.approx(-37.29, abs=0.006)


def test_the_two_divisors_differ_by_t_over_t_minus_1() -> None:
    grid = published("lora")
    over_t, over_less = value("bwt_T", grid), value("bwt_Tm1", grid)
    assert over_t is not None and over_less is not None
    assert over_t * 8 == pytest.approx(over_less * 7)


def test_nothing_is_forgotten_where_the_last_row_equals_the_diagonal() -> None:
    grid = np.tril(np.tile([91.0, 47.5, 63.0, 20.0], (4, 1)))
    for name in ("forgetting", "forgetting_max", "bwt_T", "bwt_Tm1"):
        assert value(name, grid) == 0.0
    assert value("ap", grid) == value("mft", grid)


def test_max_form_counts_from_the_best_stage_and_not_from_before_training() -> None:
    grid = np.array([[50.0, 99.0, 0.0], [65.0, 40.0, 0.0], [30.0, 45.0, 10.0]])
    assert value("forgetting", grid) == pytest.approx(((50 - 30) + (40 - 45)) / 2)
    # Task 1 was best after stage 1; the 99 that task 2 scored before its training is no knowledge to lose.
    assert value("forgetting_max", grid) == pytest.approx(((65 - 30) + (40 - 45)) / 2)


def test_forgetting_is_minus_bwt_and_gains_count() -> None:
    grid = np.array([[50.0, 0.0], [70.0, 60.0]])
    assert value("forgetting", grid) == pytest.approx(-20)
    assert value("bwt_Tm1", grid) == pytest.approx(20)


def test_one_task_has_no_forgetting_and_no_transfer() -> None:
    grid = np.array([[42.0]])
    assert value("ap", grid) == value("maa", grid) == value("mft", grid) == 42.0
    assert value("bwt_T", grid) == 0.0
    for name in ("forgetting", "forgetting_max", "bwt_Tm1", "fwt"):
        assert value(name, grid, np.array([1.0])) is None


def test_cells_that_were_not_run_make_a_metric_undefined_not_wrong() -> None:
    grid = published("lora")
    assert value("maa", grid) is None
    assert value("forgetting_max", grid) is None
    assert value("fwt", HAND) is None
    no_next = HAND.copy()
    no_next[0, 1] = NAN
    assert value("fwt", no_next, ZERO_SHOT) is None


def test_cells_above_the_diagonal_change_nothing_but_forward_transfer() -> None:
    lower = np.where(np.tri(3, dtype=bool), HAND, NAN)
    for name in metrics().keys() - {"fwt", "forgetting_max_all"}:
        assert value(name, lower, ZERO_SHOT) == value(name, HAND, ZERO_SHOT)
