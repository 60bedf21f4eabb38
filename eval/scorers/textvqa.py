"""TextVQA: agreement with ten human answers (M4C / EvalAI soft accuracy)."""

from collections.abc import Sequence

from delo_eval.scorers._vqa import leave_one_out, official_m4c, soft_accuracy
from delo_eval.scorers.base import Reference, Scorer, strings_of
from delo_llava.errors import DeloError

ANSWERS = 10


def require_ten(references: Sequence[Reference]) -> None:
    """Refuse questions on which the script's assertion fails.

    Raises:
        DeloError: some have another number of answers than ten.
    """
    others = [each.id for each in references if len(strings_of(each, "answers")) != ANSWERS]
    if others:
        raise DeloError(
            f"The M4C evaluator takes exactly {ANSWERS} answers; {len(others)} questions have others.",
            given=", ".join(others[:5]),
            fix="score natively",
        )


def official(prediction: str, reference: Reference) -> float:
    """M4C's accuracy: both sides through its normaliser, exactly ten answers (`require_ten`)."""
    require_ten([reference])
    given = [official_m4c(answer) for answer in strings_of(reference, "answers")]
    return leave_one_out(given.count(official_m4c(prediction)), ANSWERS)


SCORER = Scorer(
    "textvqa.v2",
    "min(1, matches / 3) among the human answers, each left out once; intended VQA normaliser",
    lambda prediction, reference: soft_accuracy(prediction, strings_of(reference, "answers")),
    needs=("answers",),
    several=("answers",),
    compat=Scorer(
        "textvqa.m4c.v1",
        "the same with M4C's normaliser as it is (32 periods, lost commas, split 's) and exactly ten answers",
        official,
        needs=("answers",),
        several=("answers",),
        unanswered="skipped",
        ready=require_ten,
    ),
)
