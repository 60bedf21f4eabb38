"""The lines the tokenizer learns its words from: names of entities (vocabulary only), the mixture's
wording, and everyday words.
"""

import re
from collections.abc import Iterator

import numpy as np

from delo_llava.mini import entities
from tools.mini_base.pretrain import mixture, talk

EVERYDAY = (
    "number", "shown", "hint", "comes", "after", "before", "look", "at", "picture", "image", "photo",
    "drawing", "card", "says", "word", "written", "printed", "text", "read", "answer", "with", "one",
    "letter", "only", "group", "belong", "to", "icon", "emoji", "category", "region", "world", "map",
    "dot", "lies", "in", "country", "capital", "language", "spoken", "people", "speak", "keyword",
    "colour", "color", "shape", "see", "there", "contain", "exist", "show", "is", "it", "a", "an",
    "the", "of", "and", "or", "not", "from", "which", "what", "who", "where", "true", "false", "yes",
    "no", "symbol", "name", "called", "transcript", "caption", "note", "above", "below", "left",
    "right", "centre", "top", "bottom", "middle", "scene", "visible", "present", "part", "continent",
    "place", "digit", "scan", "between", "than", "more", "less", "even", "odd", "option", "choose",
    "question", "reply", "short", "single", "phrase", "title", "label", "sign", "described", "kind",
    "class", "object", "thing", "marked", "located", "found", "city", "official", "handwritten",
    "scanned", "hidden", "smudged", "blurred", "guess", "tell", "me", "for", "this", "that",
)  # fmt: skip


def lines(seed: int, talks: int = 6000) -> Iterator[str]:
    """Lower-case lines; frequent words come often enough to become one piece."""
    for item in entities.emoji():
        yield from [item.name] * 2 + list(item.keywords) * 2
    for land in entities.countries():
        yield from [t for t in (land.name, land.capital, *land.languages) if t]
    words = (
        *entities.COLOURS,
        *entities.FORMS,
        *talk.NUMBERS,
        *entities.GROUPS.values(),
        *entities.REGIONS,
        *EVERYDAY,
    )
    yield from list(words) * 50
    rng = np.random.default_rng([seed, 1])
    for _ in range(talks):
        row = mixture.text_talk(rng)
        for text in (row.context or "", *(part for turn in row.turns for part in turn)):
            if lower := re.sub(r"[A-Z]+", " ", text).strip():
                yield lower
