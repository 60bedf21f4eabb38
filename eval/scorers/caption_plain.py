"""Captions without Java: CIDEr with plain tokens; never comparable with `caption`."""

from delo_eval.scorers._captions import all_metrics, corpus_metric, require_captions, rouge_l
from delo_eval.scorers.base import Scorer

SCORER = Scorer(
    "caption_plain.v2",
    "CIDEr over the task, lower-cased words as tokens; no METEOR",
    rouge_l,
    several=("captions", "answers"),
    corpus=corpus_metric("CIDEr", java=False),
    details=all_metrics(java=False),
    ready=require_captions,
    resamples=20,
)
