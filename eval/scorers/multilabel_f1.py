"""MM-IMDb of CMML: macro-F1 of the generated genres over the classes seen so far.

A record's own score is the F1 of its two sets. Labels are `labels`, without them the answer split at commas;
the classes are all that `classes` of the records name, without them all labels that occur.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from delo_eval.scorers._text import phrase
from delo_eval.scorers.base import Reference, Scorer

_BETWEEN = re.compile(r"[,;\n]")


def labels_said(text: str) -> set[str]:
    """The labels of an answer: parts between commas, semicolons or line ends, without case."""
    return {label for part in _BETWEEN.split(text) if (label := phrase(part))}


def labels_of(reference: Reference) -> set[str]:
    """The right labels of a record."""
    given = reference.extra.get("labels")
    return {phrase(str(label)) for label in given} if given else labels_said(reference.answer)


def f1(right: int, said: int, wanted: int) -> float:
    """F1 of `right` common items among `said` and `wanted`; 0 where all are 0."""
    return 2 * right / (said + wanted) if said + wanted else 0.0


def sample_f1(prediction: str, reference: Reference) -> float:
    """F1 of the set of labels said and the set of right ones."""
    said, wanted = labels_said(prediction), labels_of(reference)
    return f1(len(said & wanted), len(said), len(wanted))


def class_scores(predictions: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
    """F1 of each class that is right or said anywhere; labels outside the classes are not counted."""
    said = [labels_said(text) for text in predictions]
    wanted = [labels_of(reference) for reference in references]
    named = {phrase(str(name)) for reference in references for name in reference.extra.get("classes") or []}
    classes = named or set(chain.from_iterable(wanted))
    right, told, true = (
        Counter(chain.from_iterable(sets))
        for sets in ([a & b for a, b in zip(said, wanted, strict=True)], said, wanted)
    )
    return {
        name: f1(right[name], told[name], true[name]) for name in sorted(classes) if told[name] + true[name]
    }


def macro_f1(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """The mean F1 over the classes."""
    scores = class_scores(predictions, references)
    return sum(scores.values()) / len(scores) if scores else 0.0


def details(predictions: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
    """The mean over records, and the F1 of each class."""
    samples = [sample_f1(*pair) for pair in zip(predictions, references, strict=True)]
    classes = {f"F1 {name}": value for name, value in class_scores(predictions, references).items()}
    return {"sample F1": sum(samples) / len(samples), **classes}


SCORER = Scorer(
    "multilabel_f1.v2",
    "mean F1 over the seen classes of the labels listed between commas",
    sample_f1,
    corpus=macro_f1,
    details=details,
)
