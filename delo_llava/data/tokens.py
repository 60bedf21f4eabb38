"""What a tokenizer made of a record: whose tokens they are, what is cut, which words are control tokens."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from delo_llava.data.dialogue import Dialogue
from delo_llava.data.segments import SEGMENT_CONTEXT, SEGMENT_INSTRUCTION
from delo_llava.errors import DeloError
from delo_llava.tasks import Record


@dataclass(slots=True)
class Row:
    """One sequence before padding: token ids, their kinds, whether each is trained, which parts were cut."""

    ids: list[int]
    kinds: list[int]
    trained: list[bool]
    cut: list[str] = field(default_factory=list)

    def extend(self, copies: int, token: int, kind: int, trained: bool) -> None:
        """Append `copies` of one token."""
        self.ids += [token] * copies
        self.kinds += [kind] * copies
        self.trained += [trained] * copies


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


def answer_lengths(tokenizer: Any, dialogue: Dialogue, answers: Sequence[str]) -> list[int]:
    """Tokens of each answer as it would be generated, without its end token."""
    before = len(tokenizer(dialogue.turn, add_special_tokens=False)["input_ids"])
    texts = [dialogue.turn + dialogue.answer(answer.strip()) for answer in answers]
    if not texts:
        return []
    return [len(ids) - before - 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def beyond_reach(
    tokenizer: Any, dialogue: Dialogue, accepted: Sequence[Sequence[str]], most: int
) -> list[bool]:
    """Whether each question has no answer that can be generated: every one is longer than `most` tokens.

    Args:
        accepted: the texts that would be right, of each question at least one.
    """
    first = answer_lengths(tokenizer, dialogue, [texts[0] for texts in accepted])
    return [
        length > most and all(other > most for other in answer_lengths(tokenizer, dialogue, texts[1:]))
        for length, texts in zip(first, accepted, strict=True)
    ]


def fit(row: Row, record: Record, answer: int, max_length: int, room: int) -> None:
    """Cut a row's context at its end, then its instruction in the middle, until any answer has room; one
    token of each stays, as a query is their mean. An answer that is longer and does not fit loses its end.

    Args:
        answer: tokens of the answer, at the row's end; 0 in generation.
        room: most tokens that an answer to the task's questions may have.

    Raises:
        DeloError: image and template leave no such room.
    """
    for name, kind in (("context", SEGMENT_CONTEXT), ("instruction", SEGMENT_INSTRUCTION)):
        excess = len(row.ids) - answer + room - max_length
        places = [place for place, k in enumerate(row.kinds) if k == kind]
        count = max(0, min(excess, len(places) - 1))
        stay = len(places) - count
        first = stay if kind == SEGMENT_CONTEXT else stay // 2
        cut = places[first : first + count]
        row.cut += [name] if cut else []
        for place in reversed(cut):
            del row.ids[place], row.kinds[place], row.trained[place]
    prompt = len(row.ids) - answer
    if prompt + room > max_length:
        raise DeloError(
            f"Record {record.id!r} does not fit: image and template are {prompt} tokens, "
            f"and the answer may have {room}.",
            given=f"max_length {max_length}",
            fix="lower the task's max_new_tokens, or begin anew with a larger data.max_length or smaller "
            "pictures (data.max_pixels, data.max_tiles)",
        )
    if len(row.ids) > max_length:
        row.cut.append("answer")
        for values in (row.ids, row.kinds, row.trained):
            del values[max_length:]
