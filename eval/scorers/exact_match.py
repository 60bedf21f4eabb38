"""Exact match after normalisation: surrounding white space, case and trailing periods do not count.

"Red.", " red", "RED" and "red..." all match "red"; "a red one" and an empty prediction do not. Nothing inside
the answer is touched, so this is stricter than the VQA normaliser (articles and inner punctuation stay).
"""

import re

from delo_eval.scorers._text import composed
from delo_eval.scorers.base import Reference, Scorer

#: The rule in one sentence, for all scorers that share it.
RULE = "equal after strip, lower case, trailing periods removed, accents composed"

_END = re.compile(r"[\s.]+\Z")


def normalise(text: str) -> str:
    """Lower-cased, composed text without surrounding white space and without trailing periods."""
    return _END.sub("", composed(text).lower()).lstrip()


def exact_match(prediction: str, reference: Reference) -> float:
    """1.0 where the normalised strings are equal; an empty prediction is never right."""
    guess = normalise(prediction)
    return float(bool(guess) and guess == normalise(reference.answer))


SCORER = Scorer("exact_match.v2", RULE, exact_match)
