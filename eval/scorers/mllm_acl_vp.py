"""MLLM-ACL visual perception: counting and spatial questions, the answer within the prediction (eval_sat)."""

from collections.abc import Callable, Sequence

from delo_eval.scorers._text import has_phrase
from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.scienceqa import WHOLE, chosen

#: What `task` says of questions that count; the script reports them once more by themselves.
COUNTING = "Count"

Rule = Callable[[str, Reference], float]


def right(prediction: str, reference: Reference) -> float:
    """The option's letter where the answer is one, else the answer's words in the prediction, in a row."""
    if letter := WHOLE.fullmatch(reference.answer.strip()):
        return float(chosen(prediction, reference) == letter[1].upper())
    return float(has_phrase(prediction, reference.answer))


def official(prediction: str, reference: Reference) -> float:
    """A substring without case, blanks, line ends and periods, so that "a" is right in "cat"."""
    return float(_bare(reference.answer) in _bare(prediction))


def _bare(text: str) -> str:
    return text.lower().strip().replace(" ", "").replace("\n", "").replace(".", "")


def counting(rule: Rule) -> Callable[[Sequence[str], Sequence[Reference]], dict[str, float]]:
    """The share of right answers to counting questions."""

    def share(predictions: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        found = [rule(*pair) for pair in pairs if pair[1].extra.get("task") == COUNTING]
        return {COUNTING: sum(found) / len(found)} if found else {}

    return share


SCORER = Scorer(
    "mllm_acl_vp.v1",
    "the option's letter, or the words of the answer stand in the prediction",
    right,
    details=counting(right),
    compat=Scorer(
        "mllm_acl_vp.mllmcl.v1",
        "the answer is a substring of the prediction, both without blanks and periods",
        official,
        unanswered="skipped",
        details=counting(official),
    ),
)
