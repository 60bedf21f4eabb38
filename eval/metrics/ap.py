"""AP, the final average performance: (1/T) Σ_j a[T][j]. Also called ACC, AA, Average, Last or MFN."""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def average_performance(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean of the last row."""
    return mean_or_nan(grid[-1])


METRIC = Metric("ap.v1", "(1/T) sum_j a[T][j]", average_performance, of_result=True)
