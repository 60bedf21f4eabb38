"""Backward transfer as CoIN and BranchLoRA print it, divided by T: (1/T) Σ_j (a[T][j] − a[j][j])."""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def backward_transfer_over_t(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean change since each task's own stage; the last task adds zero to the sum, one to the divisor."""
    return mean_or_nan(grid[-1] - grid.diagonal())


METRIC = Metric("bwt_T.v1", "(1/T) sum_j (a[T][j] - a[j][j])", backward_transfer_over_t)
