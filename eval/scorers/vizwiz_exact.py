"""VizWiz by the one reference answer, as CoIN scores it: not the ten-answer metric."""

from delo_eval.scorers._text import upper_equal
from delo_eval.scorers.base import Scorer
from delo_eval.scorers.exact_match import RULE, exact_match

SCORER = Scorer(
    "vizwiz_exact.v2",
    RULE,
    exact_match,
    compat=Scorer("vizwiz_exact.coin.v1", "equal in upper case", upper_equal, unanswered="skipped"),
)
