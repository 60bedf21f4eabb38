"""Exact match after normalisation: surrounding white space, case and one trailing period do not count.

"Red.", " red" and "RED" all match "red"; "a red one" and an empty prediction do not. Nothing inside
the answer is touched, so this is stricter than the VQA normaliser (articles and inner punctuation stay).
"""

from delo_eval.scorers.base import Reference, Scorer


def normalise(text: str) -> str:
    """Lower-cased text without surrounding white space and without one trailing period."""
    return text.strip().lower().removesuffix(".").rstrip()


def exact_match(prediction: str, reference: Reference) -> float:
    """1.0 where the normalised strings are equal; an empty prediction is never right."""
    guess = normalise(prediction)
    return float(bool(guess) and guess == normalise(reference.answer))


SCORER = Scorer(
    "exact_match.v1", "equal after strip, lower case and one trailing period removed", exact_match
)
