"""Standard errors and the paired bootstrap against closed forms and brute force."""

import math
from typing import Any

import numpy as np
import pytest

from delo_eval.matrix.derived import cell_score, share
from delo_eval.matrix.uncertainty import (
    Array,
    Contrast,
    Outcomes,
    bootstrap_error,
    paired_bootstrap,
    resampled_means,
    standard_error,
)
from delo_eval.scorers.base import Reference, Scorer


def contrasts(first: list[Array], second: list[Array], **options: Any) -> list[Contrast]:
    """The bootstrap on S×N scores by task."""
    tasks = [Outcomes.of_means(np.concatenate(pair)) for pair in zip(first, second, strict=True)]
    return paired_bootstrap(tasks, len(first[0]), **options)


def coin(p: float, n: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((1, n)) < p).astype(float)


def test_standard_error_of_zeros_and_ones_is_the_binomial_one() -> None:
    scores = [1.0] * 30 + [0.0] * 70
    assert standard_error(scores) == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 99))
    assert standard_error([1.0] * 50) == 0.0
    assert standard_error([1.0]) is None


def test_standard_error_of_soft_scores() -> None:
    scores = [0.0, 0.3, 0.6, 1.0]
    assert standard_error(scores) == pytest.approx(100 * np.std(scores, ddof=1) / 2)


def test_bootstrap_error_of_a_mean_is_its_standard_error() -> None:
    scores = coin(0.4, 400, 1)[0]
    found = bootstrap_error(lambda drawn: float(scores[drawn].mean()), 400, resamples=800)
    assert found == pytest.approx(standard_error(scores.tolist()), rel=0.1)
    assert found == bootstrap_error(lambda drawn: float(scores[drawn].mean()), 400, resamples=800)
    assert bootstrap_error(lambda drawn: 0.0, 1, resamples=100) is None
    assert bootstrap_error(lambda drawn: 0.0, 10, resamples=0) is None


def test_a_rule_over_all_records_gets_a_bootstrap_error_and_its_own_value() -> None:
    def worst_class(predictions: list[str], references: list[Reference]) -> float:
        assert len({reference.id for reference in references}) == len(references)
        shares = []
        for name in ("a", "b"):
            own = [p == name for p, r in zip(predictions, references, strict=True) if r.answer == name]
            shares.append(sum(own) / len(own))
        return min(shares)

    scorer = Scorer("worst.v1", "", lambda p, r: float(p == r.answer), corpus=worst_class)  # type: ignore[arg-type]
    references = [Reference(str(i), "ab"[i % 2]) for i in range(200)]
    predictions = ["b" if i % 2 or i % 4 == 0 else "a" for i in range(200)]  # every second `a` is wrong
    value, error = cell_score(predictions, [0.0] * 200, scorer, references)
    assert value == pytest.approx(50)
    assert error == pytest.approx(100 * math.sqrt(0.25 / 100), rel=0.3)


def test_share_of_flags_is_unknown_where_one_is() -> None:
    assert share([1, 0, True, False]) == 50
    assert share([1, None]) is None and share([]) is None


def test_resampled_means_are_those_of_drawing_records_one_by_one() -> None:
    scores = np.concatenate([coin(0.3, 300, 1), coin(0.6, 300, 2)])
    fast = resampled_means(scores, 4000, np.random.default_rng(0))
    random = np.random.default_rng(1)
    slow = np.array([scores[:, random.integers(300, size=300)].mean(axis=1) for _ in range(4000)])
    assert fast.shape == (4000, 2)
    np.testing.assert_allclose(fast.mean(axis=0), slow.mean(axis=0), atol=0.003)
    np.testing.assert_allclose(np.cov(fast.T), np.cov(slow.T), rtol=0.1, atol=5e-5)


def test_paired_difference_interval_and_p_value() -> None:
    first = coin(0.5, 1000, 3)
    better = first.copy()
    better[0, np.flatnonzero(first[0] == 0)[:80]] = 1  # 80 records gained, none lost
    (task, ap) = contrasts([first], [better], resamples=4000)
    assert task.difference == pytest.approx(8.0) and ap == task
    assert task.error == pytest.approx(100 * math.sqrt(0.08 * 0.92 / 1000), rel=0.05)
    assert task.low < 8 < task.high and task.low > 6 and task.p_value < 0.001
    assert task.records == 1000


def test_pairing_is_what_makes_small_gains_sure() -> None:
    first = coin(0.5, 1000, 3)
    better = first.copy()
    better[0, np.flatnonzero(first[0] == 0)[:20]] = 1
    shuffled = np.random.default_rng(0).permutation(better[0])[None]
    paired, unpaired = contrasts([first], [better])[0], contrasts([first], [shuffled])[0]
    assert paired.difference == pytest.approx(unpaired.difference) == pytest.approx(2)
    assert paired.p_value < 0.001 < 0.2 < unpaired.p_value


def test_equal_runs_do_not_differ() -> None:
    scores = coin(0.5, 200, 4)
    for contrast in contrasts([scores, scores], [scores, scores], resamples=500):
        assert (contrast.difference, contrast.low, contrast.high, contrast.p_value) == (0, 0, 0, 1)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    """Two coins of the same kind: about 5 % of 200 comparisons fall below 0.05."""
    found = [
        contrasts([coin(0.5, 200, 2 * i)], [coin(0.5, 200, 2 * i + 1)], resamples=400)[0].p_value
        for i in range(200)
    ]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.11
    assert 0.4 <= np.mean(found) <= 0.6


def test_ap_is_the_mean_over_tasks_whatever_their_sizes() -> None:
    first = [np.zeros((1, 10)), np.zeros((1, 90))]
    second = [np.ones((1, 10)), np.zeros((1, 90))]
    one, two, ap = contrasts(first, second, resamples=200)
    assert (one.difference, two.difference, ap.difference) == (100, 0, 50)
    assert ap.records == 100


def test_seeds_widen_the_interval_and_pairs_of_seeds_narrow_it() -> None:
    seeds = np.concatenate([coin(p, 500, i) for i, p in enumerate((0.3, 0.5, 0.7))])
    gained = seeds.copy()
    for row in gained:
        row[np.flatnonzero(row == 0)[:20]] = 1
    in_pairs = contrasts([seeds], [gained])[0]
    apart = contrasts([seeds], [gained], same_seeds=False)[0]
    assert in_pairs.difference == pytest.approx(4) == pytest.approx(apart.difference)
    assert in_pairs.error < 1 < 10 < apart.error


def test_the_same_numbers_again() -> None:
    a, b = coin(0.5, 100, 1), coin(0.6, 100, 2)
    assert contrasts([a], [b], resamples=100) == contrasts([a], [b], resamples=100)
