"""VQAv2: agreement with ten human answers (the VQA soft accuracy)."""

from delo_eval.scorers._text import strings_of
from delo_eval.scorers._vqa import leave_one_out, official_prediction, official_punctuation, soft_accuracy
from delo_eval.scorers.base import Reference, Scorer


def official(prediction: str, reference: Reference) -> float:
    """`vqaEval.py`: predictions are normalised; answers lose punctuation only, and only where they differ."""
    answers = strings_of(reference, "answers")
    if len(set(answers)) > 1:
        answers = [official_punctuation(answer) for answer in answers]
    return leave_one_out(answers.count(official_prediction(prediction)), len(answers))


SCORER = Scorer(
    "vqav2.v1",
    "min(1, matches / 3) among the human answers, each left out once; intended VQA normaliser",
    lambda prediction, reference: soft_accuracy(prediction, strings_of(reference, "answers")),
    needs=("answers",),
    compat=Scorer(
        "vqav2.vqaeval.v1",
        "the same with the official normaliser on predictions; answers lose punctuation where they differ",
        official,
        needs=("answers",),
    ),
)
