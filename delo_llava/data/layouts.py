"""Under which keys an entry has its questions, its answers and its picture, in the layouts that people have.

| layout | keys |
|---|---|
| LLaVA, CoIN, ShareGPT | `conversations`: turns of `from` (human, gpt) and `value`, or as the next |
| OpenAI, ms-swift, LLaMA-Factory | `messages`: turns of `role` (user, assistant) and `content` |
| CoIN's tests, VQA | `text` or `question`, with `answer` (or `answer_bbox`) |
| ms-swift | `query`, `response`, `history` |
| Alpaca, LLaMA-Factory | `instruction`, `input`, `output`, `history` |

The picture is `image`, or the only one of `images`. What is not understood is refused, never guessed at: keys
of one field that say different things, system prompts, several pictures, a picture under another key.
"""

import re
from collections.abc import Mapping
from typing import Any

from delo_llava.data.faults import BadEntry, short

IMAGE_PLACEHOLDER = "<image>"

#: Keys with a list of turns; keys of a question by itself; keys of its answer.
TALKS, QUESTIONS = ("conversations", "messages"), ("text", "question", "query", "instruction")
ANSWERS, BOX = ("answer", "response", "output"), "answer_bbox"

#: All that say what is asked or answered.
SAYING = (*TALKS, *QUESTIONS, *ANSWERS, "history")

#: Who speaks, by the names that the layouts give them.
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant")

#: Keys that are read; all others become a record's `extra`, and so does `input` without `instruction`.
FIELDS = {"id", "question_id", "image", "images", "context", "system", *SAYING}

#: Names under which other tools have a picture, or what we cannot show at all.
LIKE_IMAGE = re.compile(
    r"(image|img|picture|pic|photo|video|audio)s?([_-]?(path|file|filename|name|url|uri|src|bytes|data)s?)?",
    re.IGNORECASE,
)

#: A text that is the path of a picture, whatever its key is called.
PICTURE_PATH = re.compile(r"[^\s?]{1,1020}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)

#: (question, answer) as given.
Turn = tuple[object, object]


def name_of(entry: Mapping[str, Any], otherwise: object) -> object:
    """The entry's id as given; null is none."""
    name = _first(entry, "id", "question_id")
    return otherwise if name is None else name


def turns_of(entry: Mapping[str, Any]) -> list[Turn]:
    """(question, answer) of every turn pair, as given.

    Raises:
        BadEntry: no key holds a question, or several keys say different things; turns that are none.
    """
    found = [key for key in (*TALKS, *QUESTIONS) if entry.get(key) is not None]
    if not found:
        keys = ", ".join((*TALKS, *QUESTIONS))
        told = f"there is no question under one of the keys {keys}."
        raise BadEntry("instruction_empty", told, given=f"the keys {', '.join(map(str, entry))}")
    if entry.get("system"):
        raise _unread("`system`", entry["system"])
    if found[0] in TALKS:
        turns = _talk(entry[found[0]], found[0])
    else:
        turns = [*_history(entry.get("history")), (_asked(entry, found[0]), answer_of(entry))]
    _require_agreement(entry, found[0], turns)
    return turns


def answer_of(entry: Mapping[str, Any]) -> object:
    """The answer that stands beside a question; None where there is none."""
    return next((entry[key] for key in (*ANSWERS, BOX) if not _is_absent(entry.get(key))), None)


def picture_of(entry: Mapping[str, Any]) -> object:
    """The entry's picture as given; None where it has none.

    Raises:
        BadEntry: several pictures, or one under a key that is not read.
    """
    found = [_only(entry.get(key), key) for key in ("image", "images")]
    given = [picture for picture in found if picture is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise BadEntry("keys_compete", "`image` and `images` name different pictures.")
    if given:
        return given[0]
    for key, value in entry.items():
        if key not in FIELDS and _is_picture(key, value):
            told = f"`{key}` is not read, and neither `image` nor `images` names a picture."
            raise BadEntry("image_key", told, given=short(value), fix="name the picture's file under image")
    return None


def _is_picture(key: str, value: object) -> bool:
    """Whether a key that is not read seems to hold a picture: by its name, or by a value that is its path."""
    if isinstance(value, str | bytes | list | dict) and value and LIKE_IMAGE.fullmatch(key):
        return True
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and PICTURE_PATH.fullmatch(first) is not None


def _only(given: object, key: str) -> object:
    """The one picture that a value names, None for none, which `datasets` writes as empty fields."""
    if isinstance(given, list):
        if len(given) > 1:
            raise BadEntry("entry_malformed", f"`{key}` must be one path.", given=short(given))
        given = given[0] if given else None
    if isinstance(given, dict) and not any(given.values()):
        return None
    return None if given == "" else given


def _talk(turns: object, key: str) -> list[Turn]:
    """The turn pairs of a list of turns."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadEntry("entry_malformed", f"`{key}` must be a list of turns.", given=short(turns))
    roles = [_first(turn, "from", "role") for turn in turns]
    if roles[0] == "system":
        raise _unread("a system turn", turns[0])
    asking, answering = roles[::2], roles[1::2]
    if (
        len(asking) != len(answering)
        or any(role not in ASKING for role in asking)
        or any(role not in ANSWERING for role in answering)
    ):
        told = "turns must alternate between human and gpt (or user and assistant)."
        raise BadEntry("entry_malformed", told, given=short(roles))
    said = [_content(_first(turn, "value", "content")) for turn in turns]
    return list(zip(said[::2], said[1::2], strict=True))


def _content(given: object) -> object:
    """What a turn says; parts are joined, a picture among them is its placeholder.

    Raises:
        BadEntry: a part that is neither text nor a bare mark of the picture.
    """
    if not isinstance(given, list):
        return given
    texts = []
    for part in given:
        known = part.items() if isinstance(part, dict) else ()
        filled = {key: value for key, value in known if value is not None}
        match filled:
            case {"type": "text", "text": str(text)} if len(filled) == 2:
                texts.append(text)
            case {"type": "image"} if len(filled) == 1:
                texts.append(IMAGE_PLACEHOLDER)
            case _:
                told = "a part of `content` is neither text nor a bare picture named by `images`."
                raise BadEntry("entry_malformed", told, given=short(part))
    return "".join(texts)


def _history(given: object) -> list[Turn]:
    """The earlier turns of a question."""
    if not given:
        return []
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        told = "`history` must be a list of pairs of question and answer."
        raise BadEntry("entry_malformed", told, given=short(given))
    return [(asked, answered) for asked, answered in given]


def _asked(entry: Mapping[str, Any], key: str) -> object:
    """A question by itself, Alpaca's with its input."""
    asked, more = entry[key], entry.get("input") if key == "instruction" else None
    if not more or not isinstance(asked, str):
        return asked
    if not isinstance(more, str):
        raise BadEntry("entry_malformed", "`input` must be text.", given=short(more))
    return f"{asked}\n{more}"


def _require_agreement(entry: Mapping[str, Any], read: str, turns: list[Turn]) -> None:
    """Refuse an entry of which another key says something else than what is read.

    Raises:
        BadEntry: names both keys.
    """
    others = [key for key in SAYING if not _is_absent(entry.get(key)) and key != read]
    if read in QUESTIONS and "history" in others:
        others.remove("history")
    said = [_bare(text) for turn in turns for text in turn] if others else []
    for key in others:
        value = entry[key]
        if key in TALKS:
            agrees = _talk(value, key) == turns
        else:
            agrees = any(_bare(one) in said for one in [value, *(value if isinstance(value, list) else ())])
        if not agrees:
            told = f"`{key}` says something else than {'the turns' if read in TALKS else f'`{read}`'} do."
            raise BadEntry("keys_compete", told, given=short(value), fix=f"remove {key}, or rename it")


def _first(values: Mapping[str, Any], *keys: str) -> object:
    """The value of the first of these keys that has one."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _bare(text: object) -> object:
    return text.replace(IMAGE_PLACEHOLDER, "").strip() if isinstance(text, str) else text


def _is_absent(value: object) -> bool:
    return value is None or value == "" or value == []


def _unread(what: str, given: object) -> BadEntry:
    told = f"{what} is not read, as each model family has its own template."
    fix = "put what matters into the question, and remove it"
    return BadEntry("entry_malformed", told, given=short(given), fix=fix)
