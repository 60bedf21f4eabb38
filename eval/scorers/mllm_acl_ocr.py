"""MLLM-ACL reading: OCRBench's questions, where one of the answers stands in the prediction (eval_ocr.py).

`answer_type` is the kind of a question; formulas are compared without blanks and with case. The script prints
the number of right answers divided by ten, which is per cent for the benchmark's 1000 questions.
"""

from collections.abc import Callable, Sequence

from delo_eval.scorers._text import composed, has_phrase
from delo_eval.scorers.base import Reference, Scorer, strings_of

FORMULA = "Handwritten Mathematical Expression Recognition"

#: Kinds that the script reports as one.
RECOGNITION = {
    "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
    "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition",
}  # fmt: skip

Rule = Callable[[str, Reference], float]


def is_formula(reference: Reference) -> bool:
    """Whether the answer is LaTeX."""
    return bool(reference.extra["answer_type"] == FORMULA)


def right(prediction: str, reference: Reference) -> float:
    """The words of one of the answers, whole and in a row; a formula is the whole prediction, `$` or not."""
    answers = strings_of(reference, "answers")
    if not is_formula(reference):
        return float(any(has_phrase(prediction, answer) for answer in answers))
    said = bare_formula(prediction)
    return float(bool(said) and any(said == bare_formula(answer) for answer in answers))


def bare_formula(text: str) -> str:
    """A formula without blanks, surrounding `$` and a final period."""
    return "".join(composed(text).split()).rstrip(".").strip("$").rstrip(".")


def official(prediction: str, reference: Reference) -> float:
    """One of the answers is a substring, without line ends and case, or for formulas without blanks."""

    def read(text: str) -> str:
        joined = text.strip().replace("\n", "")
        return joined.replace(" ", "") if is_formula(reference) else joined.lower()

    said = read(prediction)
    return float(any(read(answer) in said for answer in strings_of(reference, "answers")))


def by_kind(rule: Rule) -> Callable[[Sequence[str], Sequence[Reference]], dict[str, float]]:
    """The share of right answers by kind, text recognition as one."""

    def shares(predictions: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            kind = str(reference.extra["answer_type"])
            name = "Text Recognition" if kind in RECOGNITION else kind
            found.setdefault(name, []).append(rule(prediction, reference))
        return {name: sum(values) / len(values) for name, values in sorted(found.items())}

    return shares


SCORER = Scorer(
    "mllm_acl_ocr.v1",
    "the words of one of the answers stand in the prediction; a formula equals it without blanks",
    right,
    needs=("answer_type",),
    several=("answers",),
    details=by_kind(right),
    compat=Scorer(
        "mllm_acl_ocr.mllmcl.v1",
        "one of the answers is a substring of the prediction, of formulas without blanks",
        official,
        needs=("answer_type",),
        several=("answers",),
        details=by_kind(official),
    ),
)
