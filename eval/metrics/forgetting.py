"""Forgetting, diagonal form (AF, FG; PCLR): (1/(T-1)) Σ_{j<T} (a[j][j] − a[T][j]), which is −`bwt_Tm1`."""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def forgetting(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean drop since each task's own stage, over the T−1 earlier tasks; undefined for one task."""
    return mean_or_nan(grid.diagonal()[:-1] - grid[-1, :-1])


METRIC = Metric(
    "forgetting.diag_Tm1.v1", "(1/(T-1)) sum_{j<T} (a[j][j] - a[T][j])", forgetting, higher_is_better=False
)
