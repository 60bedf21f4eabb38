"""Every entry of an annotation file with all of its faults, where the reader stops at the first.

The reader has the last word: the check also reads each file with it and tells where the two disagree.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delo_llava.data.guard import GuardedJson
from delo_llava.data.images import BadImage, decode
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json
from delo_llava.tasks import SPLITS, Record, Split, TaskSpec

#: What stands for the image in a conversation.
IMAGE_PLACEHOLDER = "<image>"

#: Keys of an entry that are fields of a record; all others are its `extra`.
FIELDS = {"id", "question_id", "image", "context", "conversations", "text", "answer"}

#: Numbers of a box.
BOX = 4

#: Rows of a parquet file that are in memory at a time.
ROWS = 1024


class BrokenFile(Exception):
    """A file that cannot be read on."""


@dataclass
class Entry:
    """One entry as read.

    Attributes:
        number: its place in the file, from 0.
        id: what it is called there, or its number.
        image: absolute path, where it names an image inside the image folder.
        records: those of its turns that are whole; ids are unique within the entry only.
        faults: (code, message).
    """

    number: int
    id: str
    image: Path | None = None
    records: list[Record] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def walk(task: TaskSpec, split: Split) -> Iterator[Entry]:
    """The entries of one file, in order, in bounded memory.

    Raises:
        BrokenFile: the file cannot be read on; the entries before the break have been yielded.
    """
    classes = task.classes  # set where one file holds all tasks and splits (CMML)
    for number, raw in enumerate(raw_entries(task.files[split])):
        if not isinstance(raw, dict):
            told = f"is no object: {raw if isinstance(raw, BadLine) else _short(raw)}"
            yield Entry(number, str(number), faults=[("entry_malformed", told)])
        elif classes is None:
            yield _entry(number, raw, task, split)
        elif (item := _item(number, raw, task, split, classes.number)) is not None:
            yield item


class BadLine(str):
    """Why a line of a .jsonl file is no JSON."""


def raw_entries(path: Path) -> Iterator[Any]:
    """What a .json array, a .jsonl or a .parquet file holds, one after the other; bad lines as `BadLine`.

    Raises:
        BrokenFile: no such file, not of its format, or without entries.
    """
    readers = {".jsonl": _lines, ".parquet": _rows}
    count = 0
    try:
        for raw in readers.get(path.suffix, _array)(path):
            yield raw
            count += 1
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFile(f"cannot be read: {error}") from error
    if not count:
        raise BrokenFile("holds no entries")


def _array(path: Path) -> Iterator[Any]:
    """Elements of a JSON array."""
    import ijson

    with path.open("rb") as file:
        try:
            begin = next(ijson.basic_parse(GuardedJson(file, path)), ("nothing", None))[0]
            if begin != "start_array":
                raise BrokenFile(f"is no JSON array: it begins with {begin.replace('_', ' ')}")
            file.seek(0)
            yield from ijson.items(GuardedJson(file, path), "item", use_float=True)
        except DeloError as error:
            raise BrokenFile(error.message) from error
        except (ijson.JSONError, ArithmeticError) as error:
            raise BrokenFile(f"is not valid JSON: {' '.join(str(error).split())[:200]}") from error


def _lines(path: Path) -> Iterator[Any]:
    """Values of the lines of a JSONL file, empty lines left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                try:
                    yield parse_json(line)
                except ValueError as error:
                    yield BadLine(f"{error}: {line.strip()[:80]}")


def _rows(path: Path) -> Iterator[Any]:
    """Rows of a parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(ROWS):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise BrokenFile(f"is no valid parquet: {' '.join(str(error).split())[:200]}") from error


def _entry(number: int, raw: dict[str, Any], task: TaskSpec, split: Split) -> Entry:
    """An entry with everything that is wrong with it."""
    name = raw.get("id", raw.get("question_id", number))
    entry = Entry(number, str(name))
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        entry.faults.append(("entry_malformed", f"its id is neither text nor a number: {_short(name)}"))
    entry.image = _image(raw.get("image"), task.image_root, entry)
    context = raw.get("context")
    if context is not None and not isinstance(context, str):
        entry.faults.append(("entry_malformed", f"`context` must be text: {_short(context)}"))
        context = None
    extra = {key: value for key, value in raw.items() if key not in FIELDS}
    turns = _turns(raw, entry)
    for turn, (asked, answered) in enumerate(turns):
        where = f"turn {turn}: " if len(turns) > 1 else ""
        instruction = _instruction(asked, raw, where, entry)
        answer = _answer(answered, where, entry)
        if instruction and answer:
            name = entry.id if len(turns) == 1 else f"{entry.id}#{turn}"
            shown = (context or "").strip() or None
            record = Record(name, task.name, split, entry.image, shown, instruction, answer, extra)
            entry.records.append(record)
    return entry


def _item(number: int, raw: dict[str, Any], task: TaskSpec, split: Split, task_id: int) -> Entry | None:
    """An item of the CMML layout; None where it is another task's or split's.

    An item that does not say whose it is is told once, with the first task's training data.
    """
    part = (raw.get("task_id"), raw.get("split"))
    entry = Entry(number, f"{part[0]}-{part[1]}-{number}")
    if isinstance(part[0], bool) or not isinstance(part[0], int) or part[1] not in SPLITS:
        told = f"`task_id` and `split` do not say whose it is: {_short(part)}"
        entry.faults.append(("entry_malformed", told))
        return entry if (task_id, split) == (0, "train") else None
    if part != (task_id, split):
        return None
    entry.image = _image(raw.get("image"), task.image_root, entry)
    text = raw.get("text")
    if isinstance(text, list) and all(isinstance(one, str) for one in text):
        text = ". ".join(text)
    if text is not None and not isinstance(text, str):
        entry.faults.append(("entry_malformed", f"`text` must be text or a list of texts: {_short(text)}"))
    labels = raw.get("label")
    if not _is_label(labels):
        entry.faults.append(("label_form", f"no class, list of classes or 0/1 vector: {_short(labels)}"))
    if not entry.faults:
        shown = (text or "").strip() or None
        entry.records.append(Record(entry.id, task.name, split, entry.image, shown, "", str(labels), {}))
    return entry


def _is_label(label: object) -> bool:
    """A class index or name, or a list of either; which form a file has is decided by its reader."""
    parts = label if isinstance(label, list) else [label]
    indices = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in parts)
    return bool(parts) and (indices or all(isinstance(one, str) and one.strip() for one in parts))


def _image(given: object, root: Path, entry: Entry) -> Path | None:
    """The absolute path, as written: links are followed when the file is looked at."""
    if isinstance(given, dict) and given.get("bytes"):
        try:
            decode(io.BytesIO(given["bytes"]))
        except BadImage as error:
            entry.faults.append(("image_undecodable", f"the embedded image: {error}"))
        return None
    if isinstance(given, dict):
        given = given.get("path")
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        entry.faults.append(("entry_malformed", f"`image` must be one path: {_short(given)}"))
        return None
    path = Path(os.path.normpath(root / given))
    if path == root or not path.is_relative_to(root) or "\0" in given:
        entry.faults.append(("image_outside", f"{given!r} names no file below {root}"))
        return None
    return path


def _turns(raw: dict[str, Any], entry: Entry) -> list[tuple[object, object]]:
    """(question, answer) of every pair of turns."""
    if "conversations" not in raw:
        return [(raw.get("text"), raw.get("answer", raw.get("answer_bbox")))]
    turns = raw["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        entry.faults.append(("entry_malformed", f"`conversations` must be a list of turns: {_short(turns)}"))
        return []
    roles = [turn.get("from") for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        entry.faults.append(("entry_malformed", f"turns must alternate between human and gpt: {roles}"))
        return []
    return [(h.get("value"), g.get("value")) for h, g in zip(turns[::2], turns[1::2], strict=True)]


def _instruction(given: object, raw: dict[str, Any], where: str, entry: Entry) -> str | None:
    """What is asked, without the image's placeholder."""
    if not isinstance(given, str) or not (text := given.replace(IMAGE_PLACEHOLDER, "").strip()):
        entry.faults.append(("instruction_empty", f"{where}the instruction is {_short(given)}"))
        return None
    if IMAGE_PLACEHOLDER in given and not raw.get("image"):
        told = f"{where}the text has {IMAGE_PLACEHOLDER}, but the entry names no image"
        entry.faults.append(("placeholder_without_image", told))
        return None
    return text


def _answer(given: object, where: str, entry: Entry) -> str | None:
    """The reference answer as text; of several the first, numbers and boxes are written out."""
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        given = given[0]
    if isinstance(given, list) and len(given) == BOX and not any(isinstance(one, str) for one in given):
        return f"[{', '.join(str(number) for number in given)}]"
    if isinstance(given, int | float) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str) or not given.strip():
        entry.faults.append(("answer_empty", f"{where}the answer is {_short(given)}"))
        return None
    return given.strip()


def _short(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
