"""What a check found: a table and the first faults on the terminal, every one of them in a JSONL file."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from delo_llava import __version__
from delo_llava.data_tools.check import DataCheck, Part
from delo_llava.data_tools.faults import FAULTS, NOTES, Fault
from delo_llava.data_tools.memory import Memory
from delo_llava.errors import printable

#: Version of the JSONL file's form.
SCHEMA = 1

#: Names of keys that are listed on the terminal; the report has all.
MOST_KEYS = 40


def write_report(path: Path, check: DataCheck, parts: Sequence[Part]) -> int:
    """Write the JSONL file in one step; returns how many faults there are, notes not counted.

    The first line is the summary (`kind: summary`); each other line is one fault or note.
    """
    counts = check.memory.counts()
    faults = sum(number for (*_, code), number in counts.items() if code in FAULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        for line in _lines(check, parts, counts, faults):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return faults


def _lines(
    check: DataCheck, parts: Sequence[Part], counts: dict[tuple[str, str, str], int], faults: int
) -> Iterator[dict[str, Any]]:
    yield {
        "kind": "summary",
        "schema": SCHEMA,
        "delo_llava": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sequence": check.sequence.name,
        "faults": faults,
        "images_decoded": check.decoded,
        "images_known": check.known,
        "tokenizer": check.prompts.model if check.prompts else None,
        "max_length": check.prompts.max_length if check.prompts else None,
        "parts": [_part(part, counts) for part in parts],
    }
    for kind, notes in (("fault", False), ("note", True)):
        for fault in check.memory.faults(notes):
            yield {"kind": kind, **asdict(fault)}


def _part(part: Part, counts: dict[tuple[str, str, str], int]) -> dict[str, Any]:
    names = ("sha256", "entries", "records", "turns", "without_image", "without_context", "images")
    return {
        "task": part.task.name,
        "split": part.split,
        "file": part.file,
        **{name: getattr(part, name) for name in (*names, "trained", "cut")},
        "extra": sorted(part.extra),
        "found": _found(part, counts),
    }


def _found(part: Part, counts: dict[tuple[str, str, str], int]) -> dict[str, int]:
    """Code -> how often it was found in a part."""
    mine = (part.task.name, part.split)
    return {code: number for (*place, code), number in counts.items() if tuple(place) == mine}


def show_report(console: Console, check: DataCheck, parts: Sequence[Part], report: Path, most: int) -> None:
    """The table of counts, notes, then at most `most` faults and how many more the file has."""
    console.print(_table(check, parts))
    told = f"{check.decoded} images decoded now, {check.known} known from an earlier check"
    console.print(Text(told, style="dim"))
    if extra := set[str]().union(*(part.extra for part in parts)):
        more = ", …" if len(extra) > MOST_KEYS else ""
        told = f"kept for scorers, never shown to a model: {', '.join(sorted(extra)[:MOST_KEYS])}{more}"
        console.print(Text(printable(told), style="dim"), soft_wrap=True)
    _list(console, check.memory, True, most, "note", report)
    _list(console, check.memory, False, most, "fault", report)


def _table(check: DataCheck, parts: Sequence[Part]) -> Table:
    """One row for each (task, split)."""
    counts = check.memory.counts()
    table = Table(title=check.sequence.title or check.sequence.name)
    for name in ("task", "split"):
        table.add_column(name)
    columns = ["entries", "records", "images", "no image", "no context"]
    columns += ["trained tokens", "cut"] if check.prompts else []
    for name in (*columns, "notes", "faults"):
        table.add_column(name, justify="right")
    for part in parts:
        found = _found(part, counts)
        numbers = [part.entries, part.records, part.images, part.without_image, part.without_context]
        tried = [f"{part.trained:,}", _cut(part)] if check.prompts else []
        notes, faults = (sum(found.get(code, 0) for code in codes) for codes in (NOTES, FAULTS))
        style = "red" if faults else None
        cells = [f"{number:,}" for number in numbers] + tried
        table.add_row(part.task.name, part.split, *cells, str(notes), Text(f"{faults:,}", style or ""))
    return table


def _cut(part: Part) -> str:
    """How many records lose what."""
    return ", ".join(f"{count:,} {name}" for name, count in part.cut.items() if count) or "0"


def _list(console: Console, memory: Memory, notes: bool, most: int, word: str, report: Path) -> None:
    """The first faults or notes, one a line."""
    codes = NOTES if notes else FAULTS
    total = sum(count for (*_, code), count in memory.counts().items() if code in codes)
    for fault in islice(memory.faults(notes), most):
        console.print(_line(fault, "yellow" if notes else "red"), soft_wrap=True)
    if total > most:
        console.print(f"… and {total - most:,} more {word}s: all of them are in {report}", soft_wrap=True)


def _line(fault: Fault, style: str) -> Text:
    code, _, rest = printable(str(fault)).partition(": ")
    return Text.assemble((code, style), ": ", rest)
