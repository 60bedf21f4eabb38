"""OCR-VQA: exact match without case."""

from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.exact_match import RULE, exact_match


def official(prediction: str, reference: Reference) -> float:
    """Equal in lower case; a prediction with "Unanswerable" is wrong, even where that is the answer."""
    return float("Unanswerable" not in prediction and prediction.lower() == reference.answer.lower())


SCORER = Scorer(
    "ocrvqa.v2",
    RULE,
    exact_match,
    compat=Scorer(
        "ocrvqa.coin.v1",
        "equal in lower case, never with 'Unanswerable' in it",
        official,
        unanswered="skipped",
    ),
)
