"""MLLM-DCL finance: exact match of options and truth values."""

from delo_eval.scorers._dcl import REFUSAL
from delo_eval.scorers.base import Reference, Scorer


def bare(text: str) -> str:
    """Lower case without spaces and periods."""
    return text.lower().replace(" ", "").replace(".", "")


def right(prediction: str, reference: Reference) -> float:
    """Both sides bare and equal."""
    return float(bool(bare(prediction)) and bare(prediction) == bare(reference.answer))


def official(prediction: str, reference: Reference) -> float:
    """Only the prediction is laid bare, so an answer with a space or period can never be met."""
    return float(REFUSAL not in prediction and bare(prediction) == reference.answer.lower())


SCORER = Scorer(
    "mllm_dcl_fin.v1",
    "equal in lower case without spaces and periods",
    right,
    compat=Scorer(
        "mllm_dcl_fin.mcitlib.v1",
        "the prediction without spaces and periods equals the answer as written, in lower case",
        official,
        unanswered="skipped",
    ),
)
