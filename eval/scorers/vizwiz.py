"""VizWiz: agreement with ten human answers (its own version of the VQA metric)."""

from delo_eval.scorers._vqa import leave_one_out, official_prediction, soft_accuracy
from delo_eval.scorers.base import Reference, Scorer, strings_of


def official(prediction: str, reference: Reference) -> float:
    """VizWiz's evaluator: the prediction is normalised, the human answers are compared as written."""
    answers = strings_of(reference, "answers")
    return leave_one_out(answers.count(official_prediction(prediction)), len(answers))


SCORER = Scorer(
    "vizwiz.v2",
    "min(1, matches / 3) among the human answers, each left out once; intended VQA normaliser",
    lambda prediction, reference: soft_accuracy(prediction, strings_of(reference, "answers")),
    needs=("answers",),
    several=("answers",),
    compat=Scorer(
        "vizwiz.api.v1",
        "the same with the official normaliser on predictions and human answers as written",
        official,
        needs=("answers",),
        several=("answers",),
    ),
)
