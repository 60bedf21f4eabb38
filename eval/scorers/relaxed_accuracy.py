"""ChartQA: numbers within five per cent, anything else exact.

Methani et al. 2020, as ChartQA (Masry et al. 2022, section 5.1) uses it; the official code is pix2struct's
metrics.py.
"""

import re

from delo_eval.scorers._text import exactly
from delo_eval.scorers.base import Reference, Scorer

TOLERANCE = 0.05
_NUMBER = re.compile(r"[$€£]?\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(%?)")


def number(text: str) -> tuple[float, bool] | None:
    """The value of a number with optional currency, commas and per cent mark, and whether it has the mark."""
    found = _NUMBER.fullmatch(text.strip().rstrip("."))
    if not found or not any(character.isdigit() for character in found[1]):
        return None
    return float(found[1].replace(",", "")), bool(found[2])


def near(value: float, target: float) -> bool:
    """Within five per cent of the target; zero must be met exactly."""
    return abs(value - target) <= TOLERANCE * abs(target)


def right(prediction: str, reference: Reference) -> float:
    """Numbers within the tolerance, where a per cent mark on one side only may mean hundredths or nothing."""
    said, wanted = number(prediction), number(reference.answer)
    if said is None or wanted is None:
        return exactly(prediction, reference)
    (value, marked), (target, target_marked) = said, wanted
    readings = [value]
    if marked != target_marked:
        readings.append(value / 100 if marked else value * 100)
    return float(any(near(reading, target) for reading in readings))


def official_number(text: str) -> float | None:
    """What Python reads as a number; a trailing per cent mark divides by 100."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def official(prediction: str, reference: Reference) -> float:
    """pix2struct: relative change where the target is a number other than zero, else equal without case."""
    value, target = official_number(prediction), official_number(reference.answer)
    if value is not None and target:
        change = abs(value - target) / abs(target)
        return float(change <= TOLERANCE)
    return float(prediction.lower() == reference.answer.lower())


SCORER = Scorer(
    "relaxed_accuracy.v2",
    "numbers within 5 %, also with thousands commas, currency or a per cent mark; else the same words",
    right,
    compat=Scorer(
        "relaxed_accuracy.pix2struct.v1",
        "what float() reads within 5 % of a target that is not zero, else equal without case",
        official,
    ),
)
