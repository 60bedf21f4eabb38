"""From a checkpoint's chat template to a `Dialogue`: rendered with marks for text and answer, cut there."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from delo_llava.data.dialogue import Dialogue
from delo_llava.errors import DeloError

#: What is rendered in place of a text and an answer: no template writes these itself.
TEXT, ANSWER = "QUESTIONMARK", "ANSWERMARK"


def from_template(tokenizer: Any, template: str, placeholders: Sequence[str]) -> Dialogue:
    """The dialogue that `template` writes, without a system text of ours and without thinking.

    Args:
        placeholders: what templates of this family write for a picture.

    Raises:
        DeloError: the template fails, or does not write one turn with text, picture and answer as they are.
    """
    plain, shown = (_Rendered(tokenizer, template, picture) for picture in (False, True))
    before, turn = _split(shown.asked, TEXT)
    found = next((p for p in placeholders if before.count(p) == 1), None)
    if found is None:
        raise _unusable(f"it writes no picture as one of {', '.join(placeholders)}: {before!r}")
    image_head, image_tail = before.split(found)
    head, _ = _split(plain.asked, TEXT)
    said, after = _split(plain.answered, ANSWER)
    lead = said.removeprefix(plain.asked) if said.startswith(plain.asked) else ""
    bos = tokenizer.bos_token
    written = bool(bos) and head.startswith(bos)
    return Dialogue(
        head=head.removeprefix(bos) if written else head,
        image_head=image_head.removeprefix(bos) if written else image_head,
        image_tail=image_tail,
        turn=turn,
        lead=lead,
        end=_special_at(tokenizer, after.lstrip()) or tokenizer.eos_token,
        bos=written or adds_bos(tokenizer),
    )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins sequences with its BOS token."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def require_end_token(dialogue: Dialogue, tokenizer: Any) -> None:
    """Make sure that answers end in one token that is a control token of the tokenizer's own.

    Raises:
        DeloError: the end is several pieces, or a word among others: it would be trained as text, and stand
            in every answer.
    """
    ids = tokenizer(dialogue.end, add_special_tokens=False).input_ids
    if len(ids) != 1 or dialogue.end not in _specials(tokenizer):
        raise DeloError(
            "Answers of this family end in a token that the tokenizer does not have.",
            given=dialogue.end,
            allowed=_specials(tokenizer),
            fix="give the checkpoint its own chat template, or a tokenizer with this token",
        )


class _Rendered:
    """One turn up to where generation begins, and with an answer."""

    def __init__(self, tokenizer: Any, template: str, picture: bool) -> None:
        content = [{"type": "image"}] * picture + [{"type": "text", "text": TEXT}]
        question = [{"role": "user", "content": content}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
        options = {"chat_template": template, "tokenize": False, "enable_thinking": False}
        try:
            self.asked: str = tokenizer.apply_chat_template(question, add_generation_prompt=True, **options)
            self.answered: str = tokenizer.apply_chat_template(question + answer, **options)
        except (TemplateError, TypeError) as error:
            raise _unusable(str(error)) from error


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise _unusable(f"it writes {mark} {text.count(mark)} times: {text!r}")
    before, _, after = text.partition(mark)
    return before, after


def _special_at(tokenizer: Any, text: str) -> str | None:
    """The longest special token that `text` begins with."""
    return max((t for t in _specials(tokenizer) if text.startswith(t)), key=len, default=None)


def _specials(tokenizer: Any) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def _unusable(reason: str) -> DeloError:
    return DeloError(
        f"The checkpoint's chat template cannot be used: {reason}",
        fix="put a template for single turns with one picture in its place, or remove it to use the family's",
    )
