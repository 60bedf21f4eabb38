"""Words and phrases: the text comparison that several native rules share."""

import re
import unicodedata
from functools import lru_cache

from delo_eval.scorers.base import Reference

#: A number with its sign, separators and per cent mark, or a word with inner apostrophes; `_` parts words.
WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*%?(?![^\W_])|[^\W_]+(?:['’][^\W_]+)*")


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC): an accent typed as a mark of its own is the same letter."""
    return unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """Lower-cased words and numbers; punctuation and underscores only separate."""
    found: list[str] = WORD.findall(composed(text).lower())
    return found


@lru_cache(maxsize=1 << 16)
def phrase(text: str) -> str:
    """The words joined by single spaces; a text without any (such as "+") as it is, stripped."""
    return " ".join(words(text)) or composed(text).strip().lower()


def has_phrase(text: str, wanted: str) -> bool:
    """Whether the words of `wanted` stand in `text`, whole and in a row; an empty `wanted` never does."""
    inner = phrase(wanted)
    return bool(inner) and f" {inner} " in f" {phrase(text)} "


def exactly(prediction: str, reference: Reference) -> float:
    """1.0 where the words are the same ones in the same order; an empty prediction is never right."""
    said = phrase(prediction)
    return float(bool(said) and said == phrase(reference.answer))


def upper_equal(prediction: str, reference: Reference) -> float:
    """The official exact rule of several scripts: equal in upper case and in nothing else forgiving."""
    return float(prediction.upper() == reference.answer.upper())
