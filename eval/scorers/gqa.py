"""GQA: exact match on testdev_balanced.

The official route is CoIN's convert_gqa_for_eval.py, then eval_gqa.py, which loops over predictions only.
"""

from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.exact_match import exact_match


def official(prediction: str, reference: Reference) -> float:
    """Trailing periods go (none before a trailing space), then case, then one leading space."""
    said = prediction.rstrip(".").lower().removeprefix(" ")
    return float(said == reference.answer)


SCORER = Scorer(
    "gqa.v1",
    "equal after strip, lower case and one trailing period removed",
    exact_match,
    compat=Scorer(
        "gqa.coin.v1",
        "lower case without trailing periods and one leading space, equal to the answer as written",
        official,
        unanswered="skipped",
    ),
)
