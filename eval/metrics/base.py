"""What a metric is: an id with a version and a function of the stage × task matrix.

In every formula a[i][j] is the score (percent) on task j after training task i, 1-based, with T tasks. Where
stages are not one for each task (a joint method, the bare base) only what is made of the result is defined.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from delo_llava.registry import load_plugin, plugin_names

#: T×T float64, `nan` where not run; row = stage, column = task. For metrics `of_result` any number of rows.
Grid = NDArray[np.float64]
#: T float64: the scores before any training, or None when not run.
ZeroShot = NDArray[np.float64] | None


@dataclass(frozen=True)
class Metric:
    """A number made of the matrix.

    Attributes:
        id: name and version; results are comparable only where ids are equal.
        formula: how it is computed, in words a table can carry.
        function: from (T×T matrix, zero-shot row) to the value; `nan` where the cells it needs were not run.
        higher_is_better: the direction in which a table should point.
        of_result: it reads nothing but the last row, so that it is defined for any stages; all others need
            one stage for each task.
    """

    id: str
    formula: str
    function: Callable[[Grid, ZeroShot], float]
    higher_is_better: bool = True
    of_result: bool = False

    def __call__(self, grid: Grid, zero_shot: ZeroShot = None) -> float | None:
        """The value in percent (or points), or None where it is undefined or cells are missing."""
        value = float(self.function(np.asarray(grid, dtype=np.float64), zero_shot))
        return value if np.isfinite(value) else None


def metrics() -> dict[str, Metric]:
    """Every metric by name, shipped or from a third party."""
    return {name: cast(Metric, load_plugin("metric", name)) for name in plugin_names("metric")}


def mean_or_nan(values: Grid) -> float:
    """The mean of `values`; `nan` for none at all (a metric over T−1 tasks when T is 1)."""
    return float(values.mean()) if values.size else float("nan")
