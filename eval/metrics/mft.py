"""MFT ("New.ACC" in PCLR): (1/T) Σ_j a[j][j], what each task scored right after its training."""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def mean_fine_tune(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean of the diagonal."""
    return mean_or_nan(grid.diagonal())


METRIC = Metric("mft.v1", "(1/T) sum_j a[j][j]", mean_fine_tune)
