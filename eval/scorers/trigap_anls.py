"""TriGap's DocVQA and InfographicVQA: ANLS by its own rule, and without its cut as LAMDA-CL's toolbox does.

The toolbox (eval_ucit.py) keeps every similarity, so that "20" for "25" counts one half and any answer that
shares a letter counts something.
"""

from delo_eval.scorers.anls import edit_distance, right
from delo_eval.scorers.base import Reference, Scorer, strings_of


def official(prediction: str, reference: Reference) -> float:
    """1 − distance / longer length of the closest answer, however small; two empty texts are equal."""
    said = prediction.strip()
    return max(0.0, *(_similarity(said, answer.strip()) for answer in strings_of(reference, "answers")))


def _similarity(said: str, answer: str) -> float:
    if not said or not answer:
        return float(said == answer)
    return 1.0 - edit_distance(said.lower(), answer.lower()) / max(len(said), len(answer))


SCORER = Scorer(
    "trigap_anls.v1",
    "1 - edit distance / longer length of the closest answer, 0 from a share of 0.5 on",
    right,
    several=("answers",),
    compat=Scorer(
        "trigap_anls.cram.v1",
        "1 - edit distance / longer length of the closest answer, however small",
        official,
        unanswered="skipped",
        several=("answers",),
    ),
)
