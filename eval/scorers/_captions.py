"""Caption metrics by pycocoevalcap: BLEU-1..4, METEOR, ROUGE-L and CIDEr over a whole corpus.

PTB tokenisation and METEOR are Java programs. Without a Java runtime they are unavailable, which is an error:
another tokenisation gives other numbers, so it is another scorer (`caption_plain`).
"""

import importlib
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from delo_eval.scorers._text import composed, words
from delo_eval.scorers.base import Reference, strings_of
from delo_llava.errors import DeloError
from delo_llava.extras import require_extra

Tokens = dict[int, list[str]]


def captions_of(references: Sequence[Reference]) -> tuple[tuple[str, ...], ...]:
    """The reference captions of every record: `captions`, or a list of answers."""
    return tuple(tuple(strings_of(reference, "captions", "answers")) for reference in references)


@lru_cache(maxsize=4)
def metrics(
    predictions: tuple[str, ...], captions: tuple[tuple[str, ...], ...], java: bool
) -> dict[str, float]:
    """Every metric over the corpus; METEOR only with Java.

    Raises:
        DeloError: pycocoevalcap is not installed, or Java is wanted and missing.
    """
    if java:
        require_java()
    tokenise = _ptb if java else _plain
    said = tokenise([(text,) for text in predictions])
    wanted = tokenise(captions)
    bleu, _ = _part("bleu.bleu", "Bleu")(4).compute_score(wanted, said, verbose=0)
    found = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    if java:
        found["METEOR"] = _meteor(wanted, said)
    found["ROUGE-L"] = float(_part("rouge.rouge", "Rouge")().compute_score(wanted, said)[0])
    found["CIDEr"] = float(_part("cider.cider", "Cider")().compute_score(wanted, said)[0])
    return found


def require_captions(references: Sequence[Reference]) -> None:
    """Refuse where the library is not installed, or a record has no list of captions.

    Raises:
        DeloError: says how to install it, or which records.
    """
    _part("rouge.rouge", "Rouge")
    lacking = [each.id for each in references if not each.extra.keys() & {"captions", "answers"}]
    if lacking:
        raise DeloError(
            f"{len(lacking)} of {len(references)} records have no list of captions (`captions`, `answers`).",
            given=", ".join(lacking[:5]),
            fix="use a file of references that has them",
        )


def require_java(references: Sequence[Reference] = ()) -> None:
    """`require_captions`, and refuse where a Java runtime is missing.

    Raises:
        DeloError: names what is unavailable without Java, and the scorer that does without.
    """
    require_captions(references)
    if shutil.which("java") is None:
        raise DeloError(
            "Java is missing: METEOR and PTB tokenisation, which this caption scorer needs, are unavailable.",
            fix="install a Java runtime (Debian: default-jre-headless), or use the scorer caption_plain, "
            "which tokenises by itself and has no METEOR; its id is another and its numbers do not compare",
        )


def rouge_l(prediction: str, reference: Reference) -> float:
    """ROUGE-L of one caption with plain tokens: a record's own number; the others are over a corpus."""
    said = " ".join(words(prediction))
    wanted = [" ".join(words(caption)) for caption in strings_of(reference, "captions", "answers")]
    return float(_part("rouge.rouge", "Rouge")().calc_score([said], wanted)) if said else 0.0


def corpus_metric(name: str, java: bool) -> Callable[[Sequence[str], Sequence[Reference]], float]:
    """One of the metrics as the score of a task."""
    every = all_metrics(java)
    return lambda predictions, references: every(predictions, references)[name]


def all_metrics(java: bool) -> Callable[[Sequence[str], Sequence[Reference]], dict[str, float]]:
    """All metrics of a task, over composed texts on both sides."""

    def found(predictions: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
        wanted = tuple(tuple(map(composed, captions)) for captions in captions_of(references))
        return metrics(tuple(map(composed, predictions)), wanted, java)

    return found


def _part(module: str, name: str) -> Any:
    """A class of pycocoevalcap."""
    require_extra("captions", "A caption metric")
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)


def _meteor(wanted: Tokens, said: Tokens) -> float:
    """METEOR 1.5; the library leaves its program's output open, which is closed here."""
    meteor = _part("meteor.meteor", "Meteor")()
    try:
        return float(meteor.compute_score(wanted, said)[0])
    finally:
        meteor.meteor_p.stdout.close()
        meteor.meteor_p.stderr.close()


def _ptb(texts: Sequence[Sequence[str]]) -> Tokens:
    """Stanford's PTB tokens without punctuation, by the library's Java tokeniser.

    An empty caption is given as a period, which the tokeniser drops again: a bare last line would be lost.
    """
    rows = {i: [{"caption": " ".join(text.split()) or "."} for text in row] for i, row in enumerate(texts)}
    found: Tokens = _part("tokenizer.ptbtokenizer", "PTBTokenizer")().tokenize(rows)
    return found


def _plain(texts: Sequence[Sequence[str]]) -> Tokens:
    """Lower-cased words and numbers."""
    return {i: [" ".join(words(text)) for text in row] for i, row in enumerate(texts)}
