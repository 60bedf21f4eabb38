"""Entries of a data file as they are: a JSON array, JSON lines or parquet, read one after another.

No reader holds more than one entry (parquet: one batch) in memory, whatever the size of the file.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from delo_llava.data.faults import BadEntry
from delo_llava.data.guard import MAX_TEXT, GuardedJson
from delo_llava.errors import DeloError
from delo_llava.strict import FETCH, IS_POINTER, is_pointer, parse_json

#: Rows of a parquet file that are decoded at once; pictures may be embedded in them.
PARQUET_BATCH = 64

BOM = b"\xef\xbb\xbf"


def read_entries(path: Path, at: str = "") -> Iterator[Any]:
    """The entries of a file, by its suffix: `.jsonl`, `.parquet`, else a JSON array.

    Numbers with a point or exponent in JSON are `decimal.Decimal`, so that nothing of their writing is lost.

    Args:
        at: dotted place of the array inside a JSON file; empty: the file is the array.

    Raises:
        DeloError: no such file, not of that format, no entries; a JSON line is named.
    """
    for entry in each_entry(path, at):
        if isinstance(entry, BadEntry):
            raise entry
        yield entry


def each_entry(path: Path, at: str = "") -> Iterator[Any]:
    """As `read_entries`, but a line that is no JSON is yielded as a `BadEntry`, and those behind it follow.

    Raises:
        DeloError: as `read_entries`, for the file as a whole; what stands before a break has been yielded.
    """
    reader = {".jsonl": _lines, ".parquet": _parquet}.get(path.suffix.lower())
    found = _array(path, at) if reader is None else reader(path)
    empty = True
    try:
        if is_pointer(path):
            raise DeloError(f"This file of records cannot be read: {IS_POINTER}.", given=path, fix=FETCH)
        for entry in found:
            empty = False
            yield entry
    except FileNotFoundError:
        raise DeloError("There is no such file of records.", given=path) from None
    except OSError as error:
        raise DeloError(f"This file cannot be read: {error.strerror or error}.", given=path) from error
    if empty:
        raise DeloError("A file of records holds at least one entry.", given=_place(path, at))


def read_members(path: Path, at: str = "") -> Iterator[tuple[str, Any]]:
    """The (name, value) members of a JSON object in a file, one after another.

    Raises:
        DeloError: as `read_entries`.
    """
    with _open(path) as file:
        try:
            _require(file, path, at, "{", "a JSON object")
            yield from ijson.kvitems(GuardedJson(file, path), at)
        except (ijson.JSONError, ArithmeticError) as error:  # the latter for exponents beyond Decimal's
            raise _not_json(path, error) from error


def plain(value: object) -> float | str:
    """`json.dumps(default=plain)`: what `read_entries` gives and JSON cannot hold.

    Decimals become floats, dates and times (of parquet) ISO text; of bytes only length and hash are kept.

    Raises:
        TypeError: anything else.
    """
    match value:
        case Decimal():
            return float(value)
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()}"
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _array(path: Path, at: str) -> Iterator[Any]:
    with _open(path) as file:
        try:
            _require(file, path, at, "[", "a JSON array")
            yield from ijson.items(GuardedJson(file, path), f"{at}.item" if at else "item")
        except (ijson.JSONError, ArithmeticError) as error:  # the latter for exponents beyond Decimal's
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
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT + 1), b""), 1):
            if line.strip():
                try:
                    if len(line) > MAX_TEXT:
                        raise ValueError(f"longer than {MAX_TEXT} bytes")
                    value = _encodable(parse_json(line, Decimal), line)
                except (ValueError, ArithmeticError) as error:  # the latter for exponents beyond Decimal's
                    told = f"This file is not valid JSON: line {number}: {error}"
                    value = BadEntry("entry_malformed", told, given=path, fix="fetch it again")
                yield value


def _encodable(value: Any, line: bytes) -> Any:
    """`value`, unless an escape in it is half of a pair, which no UTF-8 can hold."""
    if rb"\ud" in line.lower():
        json.dumps(value, ensure_ascii=False, default=plain).encode()
    return value


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        batches = parquet.ParquetFile(path, memory_map=True).iter_batches(PARQUET_BATCH)
        yield from chain.from_iterable(batch.to_pylist() for batch in batches)
    except (ArrowException, OSError) as error:  # some faults of the format come as OSError
        raise DeloError(f"This file is not valid parquet: {error}", given=path) from error


def _place(path: Path, at: str) -> str:
    return f"{path}, {at}" if at else str(path)
