"""Food101 of CMML: the generated class name, exact."""

from delo_eval.scorers._text import exactly
from delo_eval.scorers.base import Scorer

SCORER = Scorer(
    "class_exact.v2",
    "the words of the class name and no others, without case; underscores part words",
    exactly,
)
