"""Captions: CIDEr with PTB tokens (needs Java); UCIT's official score is the mean of seven metrics.

The record's own score is its ROUGE-L with plain tokens, since CIDEr and BLEU are defined over a corpus.
"""

from collections.abc import Sequence

from delo_eval.scorers._captions import (
    all_metrics,
    captions_of,
    corpus_metric,
    metrics,
    require_java,
    rouge_l,
)
from delo_eval.scorers.base import Reference, Scorer


def official_metrics(predictions: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
    """MCITlib's eval_caption.py: BLEU-1..4, METEOR, ROUGE-L and CIDEr of the texts as they are written."""
    return metrics(tuple(predictions), captions_of(references), java=True)


def mean_of_seven(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """All seven, plainly averaged."""
    found = official_metrics(predictions, references)
    return sum(found.values()) / len(found)


SCORER = Scorer(
    "caption.v2",
    "CIDEr over the task, PTB tokens",
    rouge_l,
    several=("captions", "answers"),
    corpus=corpus_metric("CIDEr", java=True),
    details=all_metrics(java=True),
    ready=require_java,
    resamples=0,
    compat=Scorer(
        "caption.mcitlib.v1",
        "mean of BLEU-1..4, METEOR, ROUGE-L and CIDEr, paired by line number",
        rouge_l,
        several=("captions", "answers"),
        corpus=mean_of_seven,
        details=official_metrics,
        ready=require_java,
        by_position=True,
        resamples=0,
    ),
)
