"""VQAv2: agreement with ten human answers (the VQA soft accuracy)."""

from delo_eval.scorers._vqa import leave_one_out, official_prediction, one_line, soft_accuracy
from delo_eval.scorers.base import Reference, Scorer, strings_of


def official(prediction: str, reference: Reference) -> float:
    """`vqaEval.py` since 2021: both sides are normalised where answers differ, else compared as written."""
    said, answers = one_line(prediction), [one_line(answer) for answer in strings_of(reference, "answers")]
    if len(set(answers)) > 1:
        said, answers = official_prediction(said), [official_prediction(answer) for answer in answers]
    return leave_one_out(answers.count(said), len(answers))


SCORER = Scorer(
    "vqav2.v2",
    "min(1, matches / 3) among the human answers, each left out once; intended VQA normaliser",
    lambda prediction, reference: soft_accuracy(prediction, strings_of(reference, "answers")),
    needs=("answers",),
    several=("answers",),
    compat=Scorer(
        "vqav2.vqaeval.v2",
        "the same with the official normaliser on both sides where answers differ, else compared as written",
        official,
        needs=("answers",),
        several=("answers",),
    ),
)
