"""UCIT's question sets (ImageNet-R, ArxivQA, IconQA, CLEVR-Math): exact match."""

from delo_eval.scorers._text import upper_equal
from delo_eval.scorers.base import Scorer
from delo_eval.scorers.exact_match import RULE, exact_match

SCORER = Scorer(
    "ucit_exact.v2",
    RULE,
    exact_match,
    compat=Scorer("ucit_exact.mcitlib.v1", "equal in upper case", upper_equal, unanswered="skipped"),
)
