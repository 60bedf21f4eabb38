"""MLLM-DCL science: exact for AI2D, TQA, VQA and SciVerse, containment or listed states for MapQA.

The data set of a question is read from the start of its image's file name, as the official script does.
"""

from delo_eval.scorers._dcl import REFUSAL, answer_within
from delo_eval.scorers._text import phrase
from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.exact_match import exact_match

EXACT_SETS = {"AI2D", "TQA", "VQA", "SciVerse"}
LISTING = "Which states"


def is_exact(reference: Reference) -> bool:
    """Whether the question is from one of the sets with exact match; all others count as MapQA."""
    return reference.image.partition("_")[0] in EXACT_SETS


def right(prediction: str, reference: Reference) -> float:
    """Exact, or the share of the listed states that are named, or the answer's words in the prediction."""
    if is_exact(reference):
        return exact_match(prediction, reference)
    if LISTING in reference.instruction:
        named = {phrase(state) for state in prediction.split(",")}
        wanted = {phrase(state) for state in reference.answer.split(",")}
        return len(wanted & named) / len(wanted)
    return answer_within(prediction, reference)


def official(prediction: str, reference: Reference) -> float:
    """eval_sci.py: states are compared with the blanks around them, so a first one only matches a first.

    "Which states" is looked for in the prompt that stands beside the answer (`reads_prompt`).
    """
    said, wanted = prediction.lower(), reference.answer.lower()
    if REFUSAL in prediction:
        return 0.0
    if is_exact(reference):
        return float(said == wanted)
    if LISTING in reference.instruction:
        named, states = said.split(","), wanted.split(",")
        return sum(state in named for state in states) / len(states)
    return float(wanted in said)


SCORER = Scorer(
    "mllm_dcl_sci.v2",
    "exact match, for MapQA the answer's words in the prediction or the share of listed states",
    right,
    compat=Scorer(
        "mllm_dcl_sci.mcitlib.v2",
        "lower case equal, for MapQA substring or the share of listed states with their blanks",
        official,
        unanswered="skipped",
        reads_prompt=True,
    ),
)
