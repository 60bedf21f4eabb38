"""ImageNet classes as generated names: either name contains the other.

CoIN's eval_ImagetNet.py compares characters, pairs the n-th line of the answers with the n-th question, and
finds an empty answer in every name, so that saying nothing is right.
"""

from delo_eval.scorers._text import has_phrase
from delo_eval.scorers.base import Reference, Scorer, strings_of


def either_way(prediction: str, reference: Reference) -> float:
    """1.0 where the words of a name (any of `answers`, if given) stand in the prediction or the reverse."""
    names = strings_of(reference, "answers")
    return float(any(has_phrase(prediction, name) or has_phrase(name, prediction) for name in names))


def official(prediction: str, reference: Reference) -> float:
    """Substring either way, with case."""
    return float(reference.answer in prediction or prediction in reference.answer)


SCORER = Scorer(
    "imagenet.v2",
    "the words of one of both names stand in the other, without case; never an empty prediction",
    either_way,
    several=("answers",),
    compat=Scorer(
        "imagenet.coin.v1",
        "substring either way with case, paired by position; an empty prediction is right",
        official,
        unanswered="skipped",
        by_position=True,
    ),
)
