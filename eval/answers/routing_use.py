"""Which experts answered: counts of routing, `routing/<stage>/<pattern>/<task>.json` (docs/results.md).

Every rank writes its part, the first adds them up. Only answers that were decoded are counted, so an
evaluation that finds its answers ready leaves the counts of the earlier one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic
from delo_llava.strict import read_json

SCHEMA = "delo-llava/routing/1"
ROUTING = "routing"

#: What names a pool of a `routing_use`; its `rows` and `counts` add up.
POOL = ("task", "modality", "present", "part")


def use_file(output: Path, stage: int, pattern: str, task: str) -> Path:
    """Where the counts of one cell lie."""
    return output / ROUTING / str(stage) / pattern / f"{task}.json"


def write_use_part(file: Path, rank: int, use: dict[str, Any] | None) -> None:
    """Write one rank's counts, as `Method.routing_use` gives them; nothing for methods that do not route."""
    if use is None:
        return
    part = file.with_name(f".{file.stem}.part{rank}")
    if part.is_file():  # of an interrupted evaluation, which this one goes on with
        use = {
            **use,
            "pools": add_pools([_part(part), use]),
        }
    part.parent.mkdir(parents=True, exist_ok=True)
    _write(part, use)


def merge_use_parts(file: Path) -> None:
    """Add the parts of all ranks up into `file`, unless it already stands on more samples."""
    parts = sorted(file.parent.glob(f".{file.stem}.part*"))
    if not parts:
        return
    uses = [_part(part) for part in parts]
    merged = {"schema": SCHEMA, "layers": uses[0]["layers"], "pools": add_pools(uses)}
    if not file.is_file() or _rows(read_use(file)) <= _rows(merged):
        _write(file, merged)
    for part in parts:
        part.unlink()


def add_pools(uses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pools of several uses, rows and counts of the same pool added."""
    total: dict[tuple[Any, ...], dict[str, Any]] = {}
    for pool in (pool for use in uses for pool in use["pools"]):
        key = tuple(pool[name] for name in POOL)
        known = total.get(key)
        if known is None:
            total[key] = dict(pool)
            continue
        known["rows"] += pool["rows"]
        known["counts"] = [
            [a + b for a, b in zip(mine, more, strict=True)]
            for mine, more in zip(known["counts"], pool["counts"], strict=True)
        ]
    return list(total.values())


def read_use(file: Path) -> dict[str, Any]:
    """The counts of one cell.

    Raises:
        DeloError: not JSON, or of another schema.
    """
    content = read_json(file, "A file of routing counts", fix="evaluate this stage again")
    if content.get("schema") != SCHEMA:
        raise DeloError(
            "Counts of routing have another schema.", given=content.get("schema"), allowed=[SCHEMA]
        )
    return content


def stage_uses(output: Path, stage: int, pattern: str) -> Iterator[dict[str, Any]]:
    """The counts of every cell of one stage under one pattern; none for a method that does not route."""
    for file in sorted((output / ROUTING / str(stage) / pattern).glob("*.json")):
        yield read_use(file)


def _part(file: Path) -> dict[str, Any]:
    return read_json(file, "A part of routing counts", "remove it and evaluate again")


def _write(file: Path, content: dict[str, Any]) -> None:
    """On one line: with a number a line, the counts of a large model would be megabytes of blanks."""
    write_text_atomic(file, json.dumps(content, separators=(",", ":")) + "\n")


def _rows(use: dict[str, Any]) -> int:
    return sum(int(pool["rows"]) for pool in use["pools"])
