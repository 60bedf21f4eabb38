"""Backward transfer as MCITlib, SMoLoRA and POLARIS print it: (1/(T-1)) Σ_{j<T} (a[T][j] − a[j][j])."""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def backward_transfer_over_t_minus_1(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean change since each task's own stage over the T−1 earlier tasks; undefined for one task."""
    return mean_or_nan(grid[-1, :-1] - grid.diagonal()[:-1])


METRIC = Metric("bwt_Tm1.v1", "(1/(T-1)) sum_{j<T} (a[T][j] - a[j][j])", backward_transfer_over_t_minus_1)
