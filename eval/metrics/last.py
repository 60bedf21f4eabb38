"""Last (HiDe, MCITlib's MFN): the same number as `ap`, under the name those tables print."""

from delo_eval.metrics.ap import average_performance
from delo_eval.metrics.base import Metric

METRIC = Metric("last.v1", "(1/T) sum_j a[T][j]", average_performance, of_result=True)
