"""Forgetting, max form over trained stages: (1/(T-1)) Σ_{j<T} (max_{j<=i<T} a[i][j] − a[T][j]).

The maximum runs over stages that had trained task j: it does not depend on cells above the diagonal. The
literal form, over all stages before the last, is `forgetting_max_all`.
"""

import numpy as np

from delo_eval.metrics.base import Grid, Metric, ZeroShot, mean_or_nan


def forgetting_max(grid: Grid, zero_shot: ZeroShot) -> float:
    """Mean drop from each task's best stage so far, over the T−1 earlier tasks; undefined for one task."""
    last = len(grid) - 1
    return mean_or_nan(np.array([grid[j:last, j].max() - grid[last, j] for j in range(last)]))


METRIC = Metric(
    "forgetting_max.trained_Tm1.v1",
    "(1/(T-1)) sum_{j<T} (max_{j<=i<T} a[i][j] - a[T][j])",
    forgetting_max,
    higher_is_better=False,
)
