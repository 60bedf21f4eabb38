"""What a tokenizer made of a record: whose each token is, and which words would be control tokens."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from delo_llava.errors import DeloError
from delo_llava.tasks import Record


def control_pattern(tokenizer: Any, image_token: str) -> re.Pattern[str]:
    """What a tokenizer reads as one token that is no word: ends and beginnings, roles, padding; without the
    image token.
    """
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    found = {*tokenizer.all_special_tokens, *added} - {image_token}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


def token_kinds(
    text: str, offsets: Sequence[tuple[int, int]], prompt: Sequence[tuple[str, int]], record: Record
) -> list[int | None]:
    """The segment of each token, or None for tokens of the answer (with its end token).

    A token is of the segment in which its first visible character lies, since word pieces carry the space (or
    punctuation the line break) at a border. A token of nothing but white space is where it begins.

    Args:
        text: the whole sequence that was tokenised, which begins with the prompt.
        offsets: character span of each token in `text`.
        prompt: (text, segment) pieces.

    Raises:
        DeloError: a token spans the border of prompt and answer: generation would start from other tokens.
    """
    ends = list(accumulate(len(piece) for piece, _ in prompt))
    kinds: list[int | None] = []
    for start, end in offsets:
        if start >= ends[-1]:
            kinds.append(None)
            continue
        if end > ends[-1]:
            raise DeloError(
                f"The tokenizer joins the prompt and the answer of record {record.id!r}.",
                given=text[start:end],
            )
        visible = next((place for place in range(start, end) if not text[place].isspace()), start)
        kinds.append(prompt[bisect_right(ends, visible)][1])
    return kinds
