"""Entries of a data file as they are: a JSON array, JSON lines or parquet, read one after another.

No reader holds more than one entry (parquet: one batch) in memory, whatever the size of the file.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from delo_llava.errors import DeloError

#: Rows of a parquet file that are decoded at once; pictures may be embedded in them.
PARQUET_BATCH = 64

BOM = b"\xef\xbb\xbf"


def read_entries(path: Path, at: str = "") -> Iterator[Any]:
    """The entries of a file, by its suffix: `.jsonl`, `.parquet`, else a JSON array.

    Numbers with a point in JSON arrays are `decimal.Decimal`, so that nothing of their writing is lost.

    Args:
        at: dotted place of the array inside a JSON file; empty: the file is the array.

    Raises:
        DeloError: no such file, not of that format, no entries; a JSON line is named.
    """
    reader = {".jsonl": _lines, ".parquet": _parquet}.get(path.suffix.lower())
    found = _array(path, at) if reader is None else reader(path)
    try:
        first = next(found)
    except StopIteration:
        raise DeloError("A file of records holds at least one entry.", given=_place(path, at)) from None
    except FileNotFoundError:
        raise DeloError("There is no such file of records.", given=path) from None
    yield first
    yield from found


def read_members(path: Path, at: str = "") -> Iterator[tuple[str, Any]]:
    """The (name, value) members of a JSON object in a file, one after another.

    Raises:
        DeloError: as `read_entries`.
    """
    with _open(path) as file:
        try:
            _require(file, path, at, "{", "a JSON object")
            yield from ijson.kvitems(file, at)
        except ijson.JSONError as error:
            raise _not_json(path, error) from error


def plain(value: object) -> float:
    """`json.dumps(default=plain)`: decimals of `read_entries` as floats.

    Raises:
        TypeError: anything else that JSON cannot hold.
    """
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _array(path: Path, at: str) -> Iterator[Any]:
    with _open(path) as file:
        try:
            _require(file, path, at, "[", "a JSON array")
            yield from ijson.items(file, f"{at}.item" if at else "item")
        except ijson.JSONError as error:
            raise _not_json(path, error) from error


def _open(path: Path) -> BinaryIO:
    """The file behind a byte order mark, if it has one."""
    file = path.open("rb")
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    return file


def _require(file: BinaryIO, path: Path, at: str, opening: str, what: str) -> None:
    """Refuse a file whose top is no array or object; below the top, emptiness is told by the caller."""
    start = file.tell()
    head = file.read(4096).lstrip()
    file.seek(start)
    wanted = "{" if at else opening
    if head and head[:1].decode(errors="replace") != wanted:
        kind = "a JSON object" if at else what
        raise DeloError(
            f"This file should hold {kind}.",
            given=f"{path}: begins with {head[:20]!r}",
            fix="JSON with one object a line must be called .jsonl",
        )


def _not_json(path: Path, error: Exception) -> DeloError:
    told = " ".join(str(error).split())
    return DeloError(f"This file is not valid JSON: {told}", given=path, fix="fetch it again")


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise _not_json(path, ValueError(f"line {number}: {error}")) from error


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        batches = parquet.ParquetFile(path, memory_map=True).iter_batches(PARQUET_BATCH)
        yield from chain.from_iterable(batch.to_pylist() for batch in batches)
    except ArrowException as error:
        raise DeloError(f"This file is not valid parquet: {error}", given=path) from error


def _place(path: Path, at: str) -> str:
    return f"{path}, {at}" if at else str(path)
