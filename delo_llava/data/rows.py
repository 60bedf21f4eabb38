"""Flat rows from entries of conversations or questions; `layouts.py` says which keys they have."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from delo_llava.data.embedded import EmbeddedImages
from delo_llava.data.entries import each_entry, plain
from delo_llava.data.faults import BadEntry, Faults, Tell, short, stop
from delo_llava.data.layouts import (
    ANSWERS,
    BOX,
    FIELDS,
    IMAGE_PLACEHOLDER,
    Turn,
    answer_of,
    name_of,
    picture_of,
    turns_of,
)
from delo_llava.data.sides import Joined
from delo_llava.errors import DeloError
from delo_llava.tasks import AS_WRITTEN, Split, TaskSpec

#: How an address begins, or a picture written out as text.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")

#: Characters of one name in a path, on the file systems that there are, and of a path that names a picture.
MAX_NAME, MAX_PATH = 255, 1024

#: A row: id, image, context, instruction, answer, extra (as JSON), entry, part (of a file with many tasks).
Row = dict[str, Any]


@dataclass
class Entry:
    """One entry of a file.

    Attributes:
        number: its place in the file, from 0.
        id: what it is called there, or its number.
        part: whose it is, where one file holds many tasks and splits; None where it does not say.
        image: its path relative to the image folder; absolute where it was embedded in the file.
        extra: names of what is kept for scorers and never shown to a model.
        rows: its turns that are whole.
        faults: what is wrong with it.
    """

    number: int
    id: str
    part: str | None = None
    image: str | None = None
    extra: Set[str] = frozenset()
    rows: list[Row] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)


class Reading:
    """One pass over a file, in bounded memory: every entry with its rows and its faults.

    Entries are conversations or questions (`layouts.py`), both with an optional `context`. Every turn pair is
    a row with the id `<id>#<turn>`; ids that repeat get `~2`, `~3` … in the order of the file. An answer that
    is a list gives its first as the answer and all of them as `extra["answers"]`. Other keys go into `extra`.

    Args:
        images: where pictures that are embedded in the file are written to.
        tell: is told what is wrong with the file as a whole, or with a side file.

    Attributes:
        path: the file.
        root: the image folder, without dots.
        joined: the side files, once iterating has begun.
    """

    def __init__(self, task: TaskSpec, split: Split, images: EmbeddedImages, tell: Tell = stop) -> None:
        self.task, self.split, self.path = task, split, task.files[split]
        self.images, self.tell, self.root = images, tell, os.path.normpath(task.images_of(split))
        self.joined = Joined((), split)
        #: Every id that is taken -> the last number that was put behind it.
        self._taken: dict[str, int] = {}

    def __iter__(self) -> Iterator[Entry]:
        self._begin()
        try:
            for number, given in enumerate(each_entry(self.path)):
                if isinstance(given, dict):
                    yield self._entry(number, given)
                else:
                    yield Entry(number, str(number), faults=Faults([_no_object(given)]))
        except DeloError as error:
            self.tell(error)
        else:
            self.joined.finish()

    def rows(self) -> Iterator[Row]:
        """All rows.

        Raises:
            DeloError: the first fault of an entry, told with file, number and id.
        """
        for entry in self:
            for fault in entry.faults:
                raise fault.at(f"{self.path}, entry {entry.number} (id {entry.id})")
            yield from entry.rows

    def _begin(self) -> None:
        """What has to be known before the first entry."""
        self._taken.clear()
        self.joined = Joined(self.task.sides, self.split, self.tell)

    def _entry(self, number: int, given: dict[str, Any]) -> Entry:
        """An entry with all that is wrong with it."""
        own = name_of(given, number)
        entry = Entry(number, str(own))
        with entry.faults:
            _require_name(own)
        shows = True  # an entry with a fault in its picture has one
        with entry.faults:
            picture = picture_of(given)
            shows = picture is not None
            entry.image = place_of(picture, self.root, self.images)
        texts, known = self.joined.of(given, number, entry.image)
        context, extra, turns = None, "{}", list[Turn]()
        with entry.faults:
            context = _context(given)
        others = _others(given) | known
        entry.extra = others.keys()
        with entry.faults:
            extra = as_json(others)
        with entry.faults:
            turns = turns_of(given)
        name = self._unique(entry.id)
        several = len(turns) > 1
        for turn, (asked, answered) in enumerate(turns):
            where = f"turn {turn}: " if several else ""
            faults = len(entry.faults)
            instruction = written = ""
            with entry.faults:
                instruction = _instruction(asked, shows, where)
            with entry.faults:
                written = _answer(answered, given, where, self.task.no_answer)
            if len(entry.faults) == faults:
                row = {
                    "id": f"{name}#{turn}" if several else name,
                    "image": entry.image,
                    "context": _with(context, texts, instruction) if texts else context,
                    "instruction": instruction,
                    "answer": written.strip(),
                    "extra": extra if written == written.strip() else _with_written(extra, written),
                    "entry": number,
                    "part": None,
                }
                entry.rows.append(row)
        return entry

    def _unique(self, name: str) -> str:
        """`name`, or the first of `name~2`, `name~3` … that no earlier entry has."""
        unique, count = name, self._taken.get(name, 1)
        while unique in self._taken:
            count += 1
            unique = f"{name}~{count}"
        self._taken[name], self._taken[unique] = count, self._taken.get(unique, 1)
        return unique


def place_of(given: object, root: str, images: EmbeddedImages) -> str | None:
    """The path of a picture, relative to the root; it is checked as written: links to other disks are fine.

    A picture that the entry itself holds (bytes, or `{"bytes": …, "path": …}` as `datasets` stores images) is
    written out and named by its absolute path.

    Args:
        root: the image folder, without dots.

    Raises:
        BadEntry: not one path, or one that leads out of the root.
    """
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path") or given
    if isinstance(given, bytes):
        return str(images.write(given))
    if given is None:
        return None
    if not isinstance(given, str):
        raise BadEntry("entry_malformed", "the image must be one path.", given=short(given))
    if ADDRESS.match(given):
        told = "the image is an address or holds its data; neither is fetched or unpacked."
        raise BadEntry("entry_malformed", told, given=short(given), fix="write a file, and its path here")
    if len(given) > MAX_PATH or (len(given) > MAX_NAME and max(map(len, given.split("/"))) > MAX_NAME):
        raise BadEntry("entry_malformed", "the image is no path: it is too long.", given=short(given))
    place, below = os.path.normpath(os.path.join(root, given)), root.rstrip("/") + "/"
    if not place.startswith(below) or "\0" in given:
        raise BadEntry(
            "image_outside", f"the image lies outside the image folder {root}.", given=short(given)
        )
    return place.removeprefix(below)


def _no_object(given: object) -> BadEntry:
    """The fault of an entry that is no object, or of a line that is not even JSON."""
    if isinstance(given, BadEntry):
        return given
    return BadEntry("entry_malformed", "it is not an object.", given=short(given))


def _require_name(name: object) -> None:
    if isinstance(name, bool) or not isinstance(name, str | int | float | Decimal):
        raise BadEntry("entry_malformed", "its id must be text or a number.", given=short(name))


def _context(entry: Mapping[str, Any]) -> str | None:
    """The entry's own auxiliary text; an empty one is none."""
    given = entry.get("context")
    if given is not None and not isinstance(given, str):
        raise BadEntry("entry_malformed", "`context` must be text.", given=short(given))
    return (given or "").strip() or None


def _with(context: str | None, joined: list[str], instruction: str) -> str | None:
    """The entry's own context, then what side files add and the instruction does not say already."""
    texts = [context, *(text for text in joined if text not in instruction)]
    return "\n".join(filter(None, texts)) or None


def _others(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into `extra` of the entry's own."""
    read = FIELDS if entry.get("instruction") is None else FIELDS | {"input"}
    extra = {key: value for key, value in entry.items() if key not in read and value is not None}
    answers = answer_of(entry)
    if isinstance(answers, list) and answers is not entry.get(BOX):
        extra["answers"] = answers
    return extra


def as_json(extra: Mapping[str, Any]) -> str:
    """`extra` as it is stored; only finite numbers, as only they are JSON."""
    try:
        return json.dumps(extra, default=plain, allow_nan=False)
    except (ValueError, OverflowError) as error:
        keys = ", ".join(key for key, value in extra.items() if not _is_json(value))
        raise BadEntry("entry_malformed", f"a number is not finite or too large, in {keys}.") from error


def _is_json(value: object) -> bool:
    with suppress(ValueError, OverflowError):
        return bool(json.dumps(value, default=plain, allow_nan=False))
    return False


def _with_written(extra: str, written: str) -> str:
    """`extra` with an answer whose blanks count by some official rules."""
    return as_json({**json.loads(extra), AS_WRITTEN: written})


def _instruction(given: object, shows: bool, where: str) -> str:
    """What is asked, without the placeholder of the image, if the entry shows one."""
    if not isinstance(given, str):
        told = f"{where}the instruction must be text."
        raise BadEntry("instruction_empty", told, given=short(given))
    count = given.count(IMAGE_PLACEHOLDER)
    if count and not shows:
        told = f"{where}the text has {IMAGE_PLACEHOLDER} but the entry names no image."
        raise BadEntry("placeholder_without_image", told)
    if count > 1:
        told = f"{where}the text has {IMAGE_PLACEHOLDER} {count} times, and there is one image."
        raise BadEntry("placeholder_surplus", told, given=short(given))
    text = given.replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise BadEntry("instruction_empty", f"{where}the instruction is empty.")
    return text


def _answer(given: object, entry: Mapping[str, Any], where: str, hint: str = "") -> str:
    """The reference answer as it is written; numbers are written out, of several the first is taken.

    Args:
        hint: how answers are got, where the published file has none.
    """
    if given is None:
        told = f"{where}there is no answer; beside a question it is one of {', '.join((*ANSWERS, BOX))}."
        said = f"{told} {hint}" if hint else told
        raise BadEntry("answer_empty", said, given=f"the keys {', '.join(map(str, entry))}")
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        given = given[0]
    if isinstance(given, list) and len(given) == 4:  # a box written as numbers
        given = f"[{', '.join(str(number) for number in given)}]"
    if isinstance(given, int | float | Decimal) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str) or not given.strip():
        told = f"{where}there is no answer that is text or a number."
        raise BadEntry("answer_empty", told, given=short(given))
    return given
