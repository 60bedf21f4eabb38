"""Examples: records together with what of each may be shown. What a stage, a replay memory or a federated
client trains on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delo_llava.data.missing import Columns, MissingSpec, Presence, record_presence
from delo_llava.tasks import Record

#: A record and whether its (image, text) may be shown.
Item = tuple[Record, tuple[bool, bool]]


@dataclass(frozen=True)
class Examples:
    """Records with the presence of their modalities.

    Attributes:
        parts: (records, presence N×2) of one task each, one after the other.
    """

    parts: tuple[tuple[Sequence[Record], Presence], ...] = ()

    @classmethod
    def of(cls, records: Sequence[Record], spec: MissingSpec) -> "Examples":
        """The records of one (task, split) under a missing pattern, which is drawn over all of them."""
        return cls(((records, record_presence(spec, records)),))

    def __len__(self) -> int:
        return sum(len(records) for records, _ in self.parts)

    def __getitem__(self, index: int) -> Item:
        for records, presence in self.parts:
            if index < len(records):
                return records[index], (bool(presence[index, 0]), bool(presence[index, 1]))
            index -= len(records)
        raise IndexError("there are fewer examples")

    def __add__(self, other: "Examples") -> "Examples":
        return Examples((*self.parts, *other.parts))

    def select(self, indices: Sequence[int]) -> "Examples":
        """The examples at `indices`, in their order within each part."""
        chosen, start, parts = np.asarray(indices, dtype=np.int64), 0, []
        for records, presence in self.parts:
            mine = chosen[(chosen >= start) & (chosen < start + len(records))] - start
            start += len(records)
            if len(mine):
                parts.append((_selected(records, mine.tolist()), presence[mine]))
        return Examples(tuple(parts))

    @property
    def names(self) -> list[tuple[str, str]]:
        """(task, id) of every record."""
        return [name for records, _ in self.parts for name in _names(records)]

    @property
    def presence(self) -> Presence:
        """Boolean N×2: image, text."""
        if not self.parts:
            return np.ones((0, 2), dtype=np.bool_)
        return np.concatenate([presence for _, presence in self.parts])

    @property
    def characters(self) -> NDArray[np.int64]:
        """Characters of (instruction with answer, context) of each record: N×2."""
        if not self.parts:
            return np.zeros((0, 2), dtype=np.int64)
        return np.concatenate([_characters(records) for records, _ in self.parts])


def _selected(records: Sequence[Record], indices: list[int]) -> Sequence[Record]:
    """Some records, without reading them where they are mapped from disk."""
    select = getattr(records, "select", None)
    chosen: Sequence[Record] = [records[i] for i in indices] if select is None else select(indices)
    return chosen


def _names(records: Sequence[Record]) -> list[tuple[str, str]]:
    if isinstance(records, Columns):
        return [(records.task, name) for name in records.ids]
    return [(record.task, record.id) for record in records]


def _characters(records: Sequence[Record]) -> NDArray[np.int64]:
    known = getattr(records, "characters", None)
    if known is not None:
        return np.asarray(known, dtype=np.int64)
    counts = [(len(r.instruction) + len(r.answer), len(r.context or "")) for r in records]
    return np.array(counts, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class View:
    """Rows of a micro-batch shown once more, in another way: `items[i]` is another view of row `rows[i]`."""

    rows: tuple[int, ...]
    items: tuple[Item, ...]


def shown(item: Item) -> tuple[bool, bool]:
    """Whether (image, context) is shown: a record is shown without a field that it lacks, whatever its
    flags say.
    """
    record, (image, text) = item
    return image and record.image is not None, text and bool(record.context and record.context.strip())


def dropped_view(items: Sequence[Item], seed: int) -> View:
    """The complete rows with one modality removed, which their id and the seed decide."""
    rows = tuple(row for row, item in enumerate(items) if all(shown(item)))
    return View(rows, tuple(_without_one(items[row][0], seed) for row in rows))


def _without_one(record: Record, seed: int) -> Item:
    digest = hashlib.sha256(f"{seed}\x1f{record.task}\x1f{record.id}".encode()).digest()
    keeps_image = bool(digest[0] & 1)
    return record, (keeps_image, not keeps_image)
