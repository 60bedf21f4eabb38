"""Boxes in words: four numbers from zero to ten that count `parts` of a side (`one two two three` of four).

For models whose vocabulary knows no digits. The reference is the same box as for `grounding`, in shares.
"""

import re

from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.grounding import THRESHOLD, iou, reference_box

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def right(prediction: str, reference: Reference) -> float:
    """1.0 where the prediction is exactly four number words that make a box, and IoU > 0.5."""
    words = re.findall(r"\w+", prediction.lower())
    if len(words) != 4 or not set(words) <= set(WORDS):
        return 0.0
    box = [WORDS.index(word) / int(reference.extra["parts"]) for word in words]
    proper = box[0] < box[2] and box[1] < box[3]
    return float(proper and iou(box, reference_box(reference)) > THRESHOLD)


SCORER = Scorer(
    "grounding_words.v1",
    "IoU > 0.5 of the box that four number words count out",
    right,
    needs=("answer_bbox", "parts"),
)
