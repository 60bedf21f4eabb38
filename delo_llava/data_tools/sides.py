"""Side files that are not there or do not fit: entries that find no row in one of them."""

from typing import Any

from delo_llava.data_tools.walk import BrokenFile, raw_entries
from delo_llava.errors import DeloError
from delo_llava.tasks import Split, TaskSpec


def absent(task: TaskSpec) -> tuple[str, ...]:
    """Optional side files that are not there, one a line."""
    lines: tuple[str, ...] = task.absent
    return lines


def unmatched(task: TaskSpec, split: Split) -> list[str]:
    """One line for each side file in which some entries have no row; a faulty one is the reader's to tell."""
    sides: list[Any] = [side for side in task.sides if split in side.splits]
    if not sides:
        return []
    from delo_llava.data.sides import Joined

    entries = 0
    try:
        joined = Joined(sides, split)
        for number, entry in enumerate(raw_entries(task.files[split])):
            if isinstance(entry, dict):
                entries += 1
                image = entry.get("image")
                joined.of(entry, number, image if isinstance(image, str) and image else None)
    except (DeloError, BrokenFile):
        return []
    return [
        f"{entries - matched} of {entries} entries have no row in {side.path} (compared: {side.by})"
        for side, matched in zip(sides, joined.matched, strict=True)
        if matched < entries
    ]
