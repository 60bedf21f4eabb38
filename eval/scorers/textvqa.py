"""TextVQA: agreement with ten human answers (M4C / EvalAI soft accuracy)."""

from delo_eval.scorers._text import strings_of
from delo_eval.scorers._vqa import leave_one_out, official_m4c, soft_accuracy
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.errors import DeloError

ANSWERS = 10


def official(prediction: str, reference: Reference) -> float:
    """M4C's accuracy: both sides through its normaliser, exactly ten answers.

    Raises:
        DeloError: another number of answers, where the script's assertion fails.
    """
    answers = strings_of(reference, "answers")
    if len(answers) != ANSWERS:
        raise DeloError(
            f"Question {reference.id}: the M4C evaluator takes exactly {ANSWERS} answers.", given=len(answers)
        )
    matches = [official_m4c(answer) for answer in answers].count(official_m4c(prediction))
    return leave_one_out(matches, ANSWERS)


SCORER = Scorer(
    "textvqa.v1",
    "min(1, matches / 3) among the human answers, each left out once; intended VQA normaliser",
    lambda prediction, reference: soft_accuracy(prediction, strings_of(reference, "answers")),
    needs=("answers",),
    compat=Scorer(
        "textvqa.m4c.v1",
        "the same with M4C's normaliser as it is (32 periods, lost commas, split 's) and exactly ten answers",
        official,
        needs=("answers",),
        unanswered="skipped",
    ),
)
