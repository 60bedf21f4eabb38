"""Forgetting, max form over all stages (Chaudhry 2018): (1/(T-1)) Σ_{j<T} (max_{i<T} a[i][j] − a[T][j]).

What a task scored before its own training counts too, so all cells of the first T−1 rows are needed.
"""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def forgetting_max_all(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean drop from each task's best earlier stage, trained or not; undefined for one task."""
    earlier, last = grid[:-1, :-1], grid[-1, :-1]
    return mean_or_nan(earlier.max(axis=0, initial=-float("inf")) - last)


METRIC = Metric(
    "forgetting_max_all.Tm1.v1",
    "(1/(T-1)) sum_{j<T} (max_{i<T} a[i][j] - a[T][j])",
    forgetting_max_all,
    higher_is_better=False,
)
