"""POLARIS's rule: the reference within the prediction, exact for four named tasks.

One rule for CoIN-6 and CoIN-Long-10, looser than the benchmarks' own; POLARIS-FMCL, harness/runner.py.
"""

from delo_eval.scorers._text import exactly, has_phrase
from delo_eval.scorers.base import Reference, Scorer

EXACT_TASKS = {"scienceqa", "imagenet", "iconqa", "ai2d"}


def right(prediction: str, reference: Reference) -> float:
    """The same words for the named tasks, else the answer's words in the prediction, whole and in a row."""
    if reference.task in EXACT_TASKS:
        return exactly(prediction, reference)
    return float(has_phrase(prediction, reference.answer))


def official(prediction: str, reference: Reference) -> float:
    """Lower case and stripped: equal for the named tasks, else a substring."""
    said, wanted = prediction.strip().lower(), reference.answer.strip().lower()
    return float(said == wanted if reference.task in EXACT_TASKS else wanted in said)


SCORER = Scorer(
    "contains.v2",
    "the words of the answer stand in the prediction; equal words for scienceqa, imagenet, iconqa and ai2d",
    right,
    compat=Scorer(
        "contains.polaris.v1",
        "the answer is a substring of the prediction; equal for scienceqa, imagenet, iconqa and ai2d",
        official,
    ),
)
