"""MLLM-DCL autonomous driving: the answer within the prediction."""

from delo_eval.scorers._dcl import containment_scorer

SCORER = containment_scorer("ad")
