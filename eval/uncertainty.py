"""Standard errors and the paired bootstrap: how far a number would move with other records and other seeds.

Scores of one task are an S×N array: S runs (seeds) of one or two methods, the same N records in the same
order, each in [0, 1]. Everything is seeded, so a repeated call gives the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delo_llava.errors import DeloError

Array = NDArray[np.float64]

#: Resamples of a comparison of two runs.
RESAMPLES = 10_000
#: Most numbers held at once while resampling.
_ROOM = 20_000_000


@dataclass(frozen=True)
class Contrast:
    """The difference of two scores (second − first, in points) and how sure it is.

    Attributes:
        difference: as observed.
        error: its bootstrap standard error.
        low, high: the 95 % percentile interval.
        p_value: two-sided: twice the smaller share of resamples on either side of zero, at most 1.
        records: records behind it.
        resamples: of the bootstrap.
    """

    difference: float
    error: float
    low: float
    high: float
    p_value: float
    records: int
    resamples: int


def standard_error(scores: Sequence[float]) -> float | None:
    """Standard error of a mean, in percent points: s/√N with the sample's s, N−1 in its divisor.

    For scores of 0 and 1 that is √(p(1−p)/(N−1)), the binomial one with the unbiased variance.

    Args:
        scores: N of them, each in [0, 1].

    Returns:
        the error, or None for fewer than two records.
    """
    if len(scores) < 2:
        return None
    return 100 * float(np.std(np.asarray(scores, dtype=np.float64), ddof=1)) / math.sqrt(len(scores))


def bootstrap_error(
    score: Callable[[Sequence[int]], float], records: int, *, resamples: int, seed: int = 0
) -> float | None:
    """Standard error, in percent points, of a score that is computed over all records at once.

    Args:
        score: (indices of records, with repetitions) -> the task's score as a share.
        records: N.

    Returns:
        the standard deviation over resamples, or None for fewer than two records or resamples.
    """
    if records < 2 or resamples < 2:
        return None
    random = np.random.default_rng(seed)
    values = [score(random.integers(records, size=records).tolist()) for _ in range(resamples)]
    return 100 * float(np.std(values, ddof=1))


def resampled_means(scores: Array, resamples: int, random: np.random.Generator) -> Array:
    """Means of each run over resampled records; the same records are drawn for all runs.

    How often each distinct column (the joint outcome of all runs on a record) is drawn is multinomial, which
    is the same as drawing records one by one and needs no array of N × resamples.

    Args:
        scores: S×N.

    Returns:
        resamples×S means, as shares.
    """
    columns, counts = np.unique(scores, axis=1, return_counts=True)
    total, kinds = int(counts.sum()), len(counts)
    step = max(1, _ROOM // kinds)
    blocks = [
        random.multinomial(total, counts / total, size=min(step, resamples - start)) @ columns.T / total
        for start in range(0, resamples, step)
    ]
    return np.concatenate(blocks)


def seed_weights(runs: int, resamples: int, random: np.random.Generator) -> Array:
    """Weights of runs drawn with replacement: resamples×S, each row sums to 1."""
    return random.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs


def paired_bootstrap(
    first: Sequence[Array],
    second: Sequence[Array],
    *,
    same_seeds: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Contrast]:
    """Second minus first on the same records, for each task and for their mean (AP).

    Records are drawn anew within each task, for both methods alike (paired). With several runs of a method
    its seeds are drawn anew too, once for all tasks; a few seeds say little about all seeds, and the interval
    is then rather too narrow.

    Args:
        first: by task S₁×N_task scores in [0, 1].
        second: by task S₂×N_task scores of the same records in the same order.
        same_seeds: runs of both sides stand in pairs of the same seed, so seeds are drawn in pairs.

    Returns:
        a contrast for each task and, last, the one of their mean.

    Raises:
        DeloError: other numbers of tasks or records.
    """
    shapes = [(a.shape[1], b.shape[1]) for a, b in zip(first, second, strict=False)]
    if not shapes or len(first) != len(second) or any(a != b for a, b in shapes):
        raise DeloError("A paired bootstrap needs the same tasks and records on both sides.", given=shapes)
    random = np.random.default_rng(seed)
    runs, others = len(first[0]), len(second[0])
    weights = seed_weights(runs, resamples, random)
    opposite = weights if same_seeds and runs == others else seed_weights(others, resamples, random)
    drawn, observed = [], []
    for a, b in zip(first, second, strict=True):
        means = resampled_means(np.concatenate([a, b]), resamples, random)
        drawn.append(
            100 * ((opposite * means[:, runs:]).sum(axis=1) - (weights * means[:, :runs]).sum(axis=1))
        )
        observed.append(100 * float(b.mean() - a.mean()))
    counts = [a.shape[1] for a in first]
    contrasts = [_contrast(d, o, n) for d, o, n in zip(drawn, observed, counts, strict=True)]
    return [*contrasts, _contrast(np.mean(drawn, axis=0), float(np.mean(observed)), sum(counts))]


def _contrast(drawn: Array, observed: float, records: int) -> Contrast:
    """Interval and p-value of resampled differences; rounding noise around zero counts as zero."""
    drawn = np.where(np.abs(drawn) < 1e-9, 0.0, drawn)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return Contrast(observed, float(drawn.std(ddof=1)), float(low), float(high), p_value, records, len(drawn))
