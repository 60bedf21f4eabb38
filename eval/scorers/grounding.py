"""Grounding: intersection over union of the answered box above one half.

Boxes are (x1, y1, x2, y2) as shares of the longer side of the image, which is thought padded to a square. The
reference is `answer_bbox` ("[x1, y1, x2, y2]" or a list), without it the answer itself.
"""

import re
from collections.abc import Sequence

from delo_eval.scorers.base import Reference, Scorer
from delo_llava.errors import DeloError

THRESHOLD = 0.5
_NUMBER = re.compile(r"-?\d*\.?\d+(?:[eE][-+]?\d+)?")

Box = Sequence[float]


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where their union has no area."""
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0


def reference_box(reference: Reference) -> list[float]:
    """The right box.

    Raises:
        DeloError: not four numbers.
    """
    given = reference.extra.get("answer_bbox") or reference.answer
    try:
        parts = given.replace("[", "").replace("]", "").split(",") if isinstance(given, str) else given
        box = [float(part) for part in parts]
    except (TypeError, ValueError):
        box = []
    if len(box) != 4:
        raise DeloError(f"Question {reference.id}: a box must be [x1, y1, x2, y2].", given=given)
    return box


def right(prediction: str, reference: Reference) -> float:
    """1.0 where the prediction holds exactly four numbers that make a box, and IoU > 0.5."""
    box = [float(number) for number in _NUMBER.findall(prediction)]
    proper = len(box) == 4 and box[0] < box[2] and box[1] < box[3]
    return float(proper and iou(box, reference_box(reference)) > THRESHOLD)


def official(prediction: str, reference: Reference) -> float:
    """CoIN's eval_grounding.py: brackets are removed first and then the first and last character as well."""
    right_box = reference_box(reference)
    text = prediction.replace("[", "").replace("]", "")
    try:
        box = [float(part) for part in text[1:-1].split(",")]
    except ValueError:
        return 0.0
    if len(box) != 4:
        return 0.0
    side = max(reference.extra.get("size") or [1])
    return float(iou([side * x for x in box], [side * x for x in right_box]) > THRESHOLD)


SCORER = Scorer(
    "grounding.v1",
    "IoU > 0.5 of the four numbers of the answer",
    right,
    compat=Scorer(
        "grounding.coin.v2",
        "IoU > 0.5 after the first digit of x1 and the last of y2 are lost",
        official,
        unanswered="skipped",
    ),
)
