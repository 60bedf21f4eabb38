"""MAA (CoIN, MCITlib; "Avg" in HiDe, MAP in SMoLoRA): (1/T) Σ_i (1/i) Σ_{j<=i} a[i][j]."""

from delo_eval.metrics.base import Grid, Metric, ZeroShot


def mean_average_accuracy(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean over stages of the mean over the tasks seen so far."""
    return float(sum(grid[i, : i + 1].mean() for i in range(len(grid))) / len(grid))


METRIC = Metric("maa.v1", "(1/T) sum_i (1/i) sum_{j<=i} a[i][j]", mean_average_accuracy)
