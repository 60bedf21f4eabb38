"""GQA: exact match on testdev_balanced.

The official route is CoIN's convert_gqa_for_eval.py, then eval_gqa.py, which loops over predictions only and
counts those of balanced questions, over which the benchmark defines its accuracy.
"""

from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.exact_match import RULE, exact_match


def official(prediction: str, reference: Reference) -> float:
    """Trailing periods go (none before a trailing space), then case; blanks stay."""
    return float(prediction.rstrip(".").lower() == reference.answer)


def is_balanced(reference: Reference) -> bool:
    """Whether the question counts: all do that the questions file does not call unbalanced."""
    return reference.extra.get("isBalanced") is not False


SCORER = Scorer(
    "gqa.v2",
    RULE,
    exact_match,
    counts=is_balanced,
    compat=Scorer(
        "gqa.coin.v2",
        "lower case without trailing periods, equal to the answer as written; balanced questions only",
        official,
        unanswered="skipped",
        counts=is_balanced,
    ),
)
