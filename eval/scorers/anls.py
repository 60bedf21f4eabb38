"""DocVQA and InfographicVQA: average normalised Levenshtein similarity (ANLS), threshold one half.

Biten et al. 2019, equation 1; the official script is that of the Robust Reading Competition.
"""

from delo_eval.scorers._text import composed
from delo_eval.scorers.base import Reference, Scorer, strings_of

THRESHOLD = 0.5


def plain(text: str) -> str:
    """Lower case, with single spaces."""
    return " ".join(text.lower().split())


def edit_distance(one: str, other: str) -> int:
    """How many characters must be put in, taken out or exchanged to make one text the other (Levenshtein)."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, 1):
        here = [row]
        for column, top in enumerate(other):
            here.append(min(above[column + 1] + 1, here[column] + 1, above[column] + (left != top)))
        above = here
    return above[-1]


def right(prediction: str, reference: Reference) -> float:
    """The best similarity over the answers: 1 − distance / longer length where that share is below 0.5."""
    said = plain(composed(prediction))
    return max(_similarity(said, plain(composed(answer))) for answer in strings_of(reference, "answers"))


def _similarity(said: str, answer: str) -> float:
    length = max(len(said), len(answer))
    share = edit_distance(said, answer) / length if said and length else 1.0
    return 1.0 - share if share < THRESHOLD else 0.0


def official(prediction: str, reference: Reference) -> float:
    """The script divides by lengths before blanks are removed, and keeps a similarity of exactly one half."""
    best = 1 - min(_official_share(prediction, answer) for answer in strings_of(reference, "answers"))
    return best if best >= THRESHOLD else 0.0


def _official_share(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return edit_distance(plain(prediction), plain(answer)) / length if length else 0.0


SCORER = Scorer(
    "anls.v2",
    "1 - edit distance / longer length of the closest answer, 0 from a share of 0.5 on",
    right,
    several=("answers",),
    compat=Scorer(
        "anls.rrc.v1",
        "lengths with all blanks; a similarity of exactly 0.5 counts",
        official,
        several=("answers",),
    ),
)
