"""Standard errors and the paired bootstrap: how far a number would move with other records and other seeds.

Everything is seeded, so a repeated call gives the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Outcomes:
    """What S runs made of one task's records.

    Attributes:
        observed: S scores, as shares.
        records: N.
        draw: (resamples, generator) -> resamples×S scores over drawn records, the same for all runs.
    """

    observed: Array
    records: int
    draw: Callable[[int, np.random.Generator], Array]

    @classmethod
    def of_means(cls, scores: Array) -> "Outcomes":
        """Of S×N scores whose mean is the task's score."""
        return cls(scores.mean(axis=1), scores.shape[1], partial(resampled_means, scores))


def paired_bootstrap(
    tasks: Sequence[Outcomes],
    runs: int,
    *,
    same_seeds: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Contrast]:
    """Second minus first method on the same records, for each task and for their mean (AP).

    Records are drawn anew within each task, for both methods alike (paired). With several runs of a method
    its seeds are drawn anew too, once for all tasks; a few seeds say little about all seeds, and the interval
    is then rather too narrow.

    Args:
        tasks: outcomes of the runs of the first method, followed by those of the second; at least one task.
        runs: how many of them are the first method's.
        same_seeds: runs of both methods stand in pairs of the same seed, so seeds are drawn in pairs.

    Returns:
        a contrast for each task and, last, the one of their mean.
    """
    random = np.random.default_rng(seed)
    others = len(tasks[0].observed) - runs
    first = seed_weights(runs, resamples, random)
    second = first if same_seeds and runs == others else seed_weights(others, resamples, random)
    signed = np.concatenate([-first, second], axis=1)
    drawn = [100 * (signed * task.draw(resamples, random)).sum(axis=1) for task in tasks]
    observed = [100 * float(task.observed[runs:].mean() - task.observed[:runs].mean()) for task in tasks]
    counts = [task.records for task in tasks]
    contrasts = [_contrast(d, o, n) for d, o, n in zip(drawn, observed, counts, strict=True)]
    return [*contrasts, _contrast(np.mean(drawn, axis=0), float(np.mean(observed)), sum(counts))]


def _contrast(drawn: Array, observed: float, records: int) -> Contrast:
    """Interval and p-value of resampled differences; rounding noise around zero counts as zero."""
    drawn = np.where(np.abs(drawn) < 1e-9, 0.0, drawn)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return Contrast(observed, float(drawn.std(ddof=1)), float(low), float(high), p_value, records, len(drawn))
