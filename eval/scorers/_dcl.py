"""MLLM-DCL: what its five rules share (MCITlib's eval_ai2d.py, eval_pvqa.py, eval_sci.py, eval_finvis.py)."""

from delo_eval.scorers._text import has_phrase
from delo_eval.scorers.base import Reference, Scorer

#: A prediction with this word is wrong by every official rule of the benchmark.
REFUSAL = "Unanswerable"


def answer_within(prediction: str, reference: Reference) -> float:
    """The native rule: the words of the answer stand in the prediction, whole and in a row."""
    return float(has_phrase(prediction, reference.answer))


def official_containment(prediction: str, reference: Reference) -> float:
    """An answer of several words must be a substring; a single one, where the prediction has a space, needs a
    space before it or a space, period or comma after it: on one side only."""
    said, wanted = prediction.lower(), reference.answer.lower()
    if REFUSAL in prediction:
        return 0.0
    if " " in wanted:
        return float(wanted in said)
    wanted = wanted.replace(".", "")
    if " " not in said:
        return float(wanted in said)
    neighbours = (f" {wanted}", f"{wanted} ", f"{wanted}.", f"{wanted},")
    return float(any(text in said for text in neighbours))


def containment_scorer(domain: str) -> Scorer:
    """The scorer of remote sensing and of driving, which differ in name only."""
    return Scorer(
        f"mllm_dcl_{domain}.v2",
        "the words of the answer stand in the prediction, whole and in a row",
        answer_within,
        compat=Scorer(
            f"mllm_dcl_{domain}.mcitlib.v1",
            "containment rule: phrases as substrings, single words with a neighbour on one side",
            official_containment,
            unanswered="skipped",
        ),
    )
