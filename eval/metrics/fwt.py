"""Forward transfer (POLARIS): (1/(T-1)) Σ_{j>=2} (a[j-1][j] − zero_shot[j]).

It needs the cells just above the diagonal (the next task, before it is trained) and the zero-shot row.
"""

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def forward_transfer(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean gain on the next, untrained task over the base; `nan` without a zero-shot row or for one task."""
    if zero_shot is None:
        return float("nan")
    return mean_or_nan(grid.diagonal(offset=1) - zero_shot[1:])


METRIC = Metric("fwt.polaris_Tm1.v1", "(1/(T-1)) sum_{j>=2} (a[j-1][j] - zero_shot[j])", forward_transfer)
