"""MLLM-DCL finance: exact match of options and truth values."""

from delo_eval.scorers._dcl import REFUSAL
from delo_eval.scorers._text import composed
from delo_eval.scorers.base import Reference, Scorer


def bare(text: str) -> str:
    """Lower case without white space and without trailing periods; those inside belong to numbers."""
    return "".join(composed(text).lower().split()).rstrip(".")


def right(prediction: str, reference: Reference) -> float:
    """Both sides bare and equal."""
    said = bare(prediction)
    return float(bool(said) and said == bare(reference.answer))


def official(prediction: str, reference: Reference) -> float:
    """Only the prediction loses blanks and periods, so an answer with one can never be met."""
    said = prediction.lower().replace(" ", "").replace(".", "")
    return float(REFUSAL not in prediction and said == reference.answer.lower())


SCORER = Scorer(
    "mllm_dcl_fin.v2",
    "equal in lower case without blanks and trailing periods",
    right,
    compat=Scorer(
        "mllm_dcl_fin.mcitlib.v1",
        "the prediction without spaces and periods equals the answer as written, in lower case",
        official,
        unanswered="skipped",
    ),
)
