"""MLLM-DCL medicine: the answer within the prediction."""

from delo_eval.scorers._dcl import REFUSAL, answer_within
from delo_eval.scorers.base import Reference, Scorer


def official(prediction: str, reference: Reference) -> float:
    """Substring without case, so that "no" is right in "not known"."""
    return float(REFUSAL not in prediction and reference.answer.lower() in prediction.lower())


SCORER = Scorer(
    "mllm_dcl_med.v2",
    "the words of the answer stand in the prediction, whole and in a row",
    answer_within,
    compat=Scorer(
        "mllm_dcl_med.mcitlib.v1",
        "the answer is a substring of the prediction",
        official,
        unanswered="skipped",
    ),
)
