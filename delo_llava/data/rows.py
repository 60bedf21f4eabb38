"""Flat rows from entries in CoIN's and LLaVA's formats: conversations for training, questions for tests."""

import json
import os
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from delo_llava.data.embedded import EmbeddedImages
from delo_llava.data.entries import plain, read_entries
from delo_llava.data.sides import Joined
from delo_llava.errors import DeloError
from delo_llava.tasks import Split, TaskSpec

IMAGE_PLACEHOLDER = "<image>"

#: Keys of an entry that become fields of a record; all others are its `extra`.
FIELDS = {"id", "question_id", "image", "context", "conversations", "text", "answer"}

#: A row: id, image, context, instruction, answer, extra (as JSON), entry, part (of a file with many tasks).
Row = dict[str, Any]


def rows(task: TaskSpec, split: Split, images: EmbeddedImages) -> Iterator[Row]:
    """Flat rows of a CoIN file, in its order.

    Entries are conversations (`id`, `image`, `conversations`) or questions (`question_id`, `image`, `text`,
    `answer` or `answer_bbox`), both with an optional `context`. Every turn pair of a conversation is a row
    with the id `<id>#<turn>`; ids that repeat get `~2`, `~3` … in the order of the file. An answer that is a
    list gives its first as the answer and all of them as `extra["answers"]`. Other keys go into `extra`.

    Args:
        images: where pictures that are embedded in the file are written to.

    Raises:
        DeloError: a fault of the file, of an entry (named), or of a side file.
    """
    path, seen = task.files[split], set[str]()
    joined = Joined(task.sides, split)
    for number, entry in enumerate(read_entries(path)):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise DeloError(f"{where} is not an object.", given=repr(entry)[:80])
        name = _unique(str(entry.get("id", entry.get("question_id", number))), seen)
        where += f" (id {name})"
        image = image_of(entry, task.image_root, images, where)
        texts, known = joined.of(entry, number, image)
        context = _context(entry, where)
        extra = json.dumps(_others(entry) | known, default=plain)
        turns = list(_turns(entry, where))
        for turn, (instruction, answer) in enumerate(turns):
            yield {
                "id": name if len(turns) == 1 else f"{name}#{turn}",
                "image": image,
                "context": _with(context, texts, instruction) if texts else context,
                "instruction": instruction,
                "answer": answer,
                "extra": extra,
                "entry": number,
                "part": None,
            }
    joined.require_matches()


def image_of(entry: Mapping[str, Any], root: Path, images: EmbeddedImages, where: str) -> str | None:
    """The image's path relative to the root; it is checked as written, so links to other disks are fine.

    A picture that the entry itself holds (`{"bytes": …, "path": …}`, as `datasets` stores images) is written
    out and named by its absolute path.

    Raises:
        DeloError: not one path, or one that leads out of the root.
    """
    given = entry.get("image")
    if isinstance(given, Mapping) and given.get("bytes"):
        return str(images.write(given["bytes"], where))
    if isinstance(given, Mapping):
        given = given.get("path")
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise DeloError(f"{where}: `image` must be one path.", given=repr(given)[:80])
    relative = os.path.relpath(os.path.normpath(root / given), root)
    if Path(relative).parts[0] == "..":
        raise DeloError(f"{where}: the image lies outside the image folder {root}.", given=given)
    return relative


def _unique(name: str, seen: set[str]) -> str:
    """`name`, or the first of `name~2`, `name~3` … that no earlier entry has."""
    unique, count = name, 1
    while unique in seen:
        count += 1
        unique = f"{name}~{count}"
    seen.add(unique)
    return unique


def _context(entry: Mapping[str, Any], where: str) -> str | None:
    """The entry's own auxiliary text; an empty one is none."""
    given = entry.get("context")
    if given is not None and not isinstance(given, str):
        raise DeloError(f"{where}: `context` must be text.", given=repr(given)[:80])
    return (given or "").strip() or None


def _with(context: str | None, joined: list[str], instruction: str) -> str | None:
    """The entry's own context, then what side files add and the instruction does not say already."""
    texts = [context, *(text for text in joined if text not in instruction)]
    return "\n".join(filter(None, texts)) or None


def _others(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into `extra` of the entry's own."""
    extra = {key: value for key, value in entry.items() if key not in FIELDS and value is not None}
    if isinstance(entry.get("answer"), list):
        extra["answers"] = entry["answer"]
    return extra


def _turns(entry: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """(instruction, answer) of every turn pair."""
    turns = entry.get("conversations")
    if turns is None:
        answer = entry.get("answer", entry.get("answer_bbox"))
        yield _instruction(entry.get("text"), entry, where), _answer(answer, where)
        return
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DeloError(f"{where}: `conversations` must be a list of turns.", given=repr(turns)[:80])
    roles = [turn.get("from") for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        raise DeloError(f"{where}: turns must alternate between human and gpt.", given=roles)
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        yield _instruction(human.get("value"), entry, where), _answer(gpt.get("value"), where)


def _instruction(given: object, entry: Mapping[str, Any], where: str) -> str:
    """What is asked, without the image's placeholder."""
    if not isinstance(given, str):
        raise DeloError(f"{where}: the instruction must be text.", given=repr(given)[:80])
    if IMAGE_PLACEHOLDER in given and not entry.get("image"):
        raise DeloError(f"{where}: the text has {IMAGE_PLACEHOLDER} but the entry names no image.")
    text = given.replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise DeloError(f"{where}: the instruction is empty.")
    return text


def _answer(given: object, where: str) -> str:
    """The reference answer as text; numbers are written out, of several the first is taken."""
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        given = given[0]
    if isinstance(given, list) and len(given) == 4:  # a box written as numbers
        given = f"[{', '.join(str(number) for number in given)}]"
    if isinstance(given, int | float | Decimal) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str) or not given.strip():
        raise DeloError(f"{where}: there is no answer.", given=repr(given)[:80])
    return given.strip()
