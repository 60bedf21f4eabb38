"""Side files joined to records by a key: captions, hints and tokens as context, references for scorers."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from delo_llava.data.entries import read_entries, read_members
from delo_llava.data.faults import Tell, stop
from delo_llava.data.layouts import name_of
from delo_llava.errors import DeloError
from delo_llava.tasks import SideFile, Split

#: What `SideFile.by` may derive from an entry; any other word is one of the entry's own fields.
DERIVED = ("id", "number", "image", "image_name", "image_stem", "image_number")


class Joined:
    """The side files of one (task, split), held in memory by key: only what the recipe takes of each row.

    Args:
        tell: is told of a file that cannot be read, or has a row without its key; it is left out then.
    """

    def __init__(self, sides: Sequence[SideFile], split: Split, tell: Tell = stop) -> None:
        self._sides: list[SideFile] = []
        self._rows: list[dict[str, tuple[str, list[Any]]]] = []
        self._tell, self._entries = tell, 0
        for side in sides:
            if split in side.splits:
                try:
                    rows = _read(side)
                except DeloError as error:
                    tell(error)
                else:
                    self._sides.append(side)
                    self._rows.append(rows)
        self._matched = [0] * len(self._sides)

    def of(
        self, entry: Mapping[str, Any], number: int, image: str | None
    ) -> tuple[list[str], dict[str, Any]]:
        """Context texts and extra keys that an entry gets.

        Args:
            number: of the entry in its file, from 0.
            image: path of its image, relative to the image folder.
        """
        self._entries += 1
        texts: list[str] = []
        extra: dict[str, Any] = {}
        for place, (side, rows) in enumerate(zip(self._sides, self._rows, strict=True)):
            key = _key_of(side.by, entry, number, image)
            if key is None or (found := rows.get(key)) is None:
                continue
            self._matched[place] += 1
            text, values = found
            if text:
                texts.append(f"{side.prefix}{text}")
            extra |= dict(zip(side.extra, values, strict=True))
        return texts, extra

    def finish(self) -> None:
        """Tell of a side file of which no row belongs to any record: the key or the file is wrong."""
        for side, rows, count in zip(self._sides, self._rows, self._matched, strict=True):
            if count == 0:
                self._tell(
                    DeloError(
                        f"No record has a row in the side file {side.name!r} (compared: {side.by}).",
                        given=f"{side.path}, keys such as {', '.join(list(rows)[:3]) or 'none'}",
                        fix="fetch the file that belongs to these records, or remove it where it is optional",
                    )
                )

    def unmatched(self) -> Iterator[str]:
        """One line for each side file in which some, not all, of the entries so far have no row."""
        for side, count in zip(self._sides, self._matched, strict=True):
            if 0 < count < self._entries:
                lacking = f"{self._entries - count} of {self._entries} entries have no row"
                yield f"{lacking} in {side.path} (compared: {side.by})"


def _read(side: SideFile) -> dict[str, tuple[str, list[Any]]]:
    """Key -> (context text, values of `side.extra` in order)."""
    rows: dict[str, tuple[str, list[Any]]] = {}
    gathered: dict[str, tuple[list[str], list[Any]]] = {}
    for key, row in _keyed(side):
        text = _text(_pick(row, side.context)) if side.context else ""
        values = [_interned(_pick(row, place)) for place in side.extra.values()]
        if side.gather:
            texts, columns = gathered.setdefault(key, ([], [[] for _ in values]))
            texts += [text] if text else []
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        else:
            rows[key] = (text, values)
    return rows | {key: (" ".join(texts), columns) for key, (texts, columns) in gathered.items()}


def _keyed(side: SideFile) -> Iterator[tuple[str, Any]]:
    """(key, row) of a side file, in its order."""
    if side.shape == "map":
        yield from read_members(side.path, side.at)
        return
    for number, row in enumerate(read_entries(side.path, side.at)):
        if side.shape == "keys":
            yield str(row), True
            continue
        if not isinstance(row, dict) or any(row.get(name) is None for name in side.key):
            raise DeloError(
                f"{side.path}, row {number} lacks its key.",
                given=repr(row)[:80],
                allowed=side.key,
                fix=f"correct `key` of the side file {side.name!r} in the recipe",
            )
        yield " ".join(str(row[name]) for name in side.key), row


def _key_of(by: str, entry: Mapping[str, Any], number: int, image: str | None) -> str | None:
    """The key of an entry; None where it has none."""
    if by == "id":
        return str(name_of(entry, number))
    if by == "number":
        return str(number + 1)
    if by not in DERIVED:
        given = entry.get(by)
        return None if given is None else str(given)
    if image is None:
        return None
    path = PurePosixPath(image)
    if by == "image_number":
        digits = re.search(r"\d+$", path.stem)
        return str(int(digits[0])) if digits else None
    return {"image": image, "image_name": path.name, "image_stem": path.stem}[by]


def _pick(row: Any, place: str) -> Any:
    """What stands at `a.b`, `a[].b` or `.` in a row; None where something is missing on the way."""
    for step in place.split(".") if place != "." else ():
        name, brackets, _ = step.partition("[]")
        many, row = isinstance(row, list), row
        row = [_member(item, name) for item in row] if many else _member(row, name)
        if brackets and not isinstance(row, list):
            return None
    return row


def _member(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else None


def _text(value: Any) -> str:
    """A context as text: lists are joined by spaces."""
    if isinstance(value, list):
        return " ".join(str(part).strip() for part in value)
    return str(value or "").strip()


def _interned(value: Any) -> Any:
    """`value` with its strings shared: human answers repeat a few words hundreds of thousands of times."""
    if isinstance(value, str):
        return sys.intern(value)
    return [_interned(item) for item in value] if isinstance(value, list) else value
