"""Records of a task's split, kept memory mapped on disk: read once from the data's own files, then mapped.

The first read of a file checks all of it and stores flat rows as Arrow in the cache; later reads map that.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from delo_llava.cache import cache_root, writable
from delo_llava.data.cmml import CmmlReading, part_of
from delo_llava.data.embedded import EmbeddedImages
from delo_llava.data.faults import Tell, stop
from delo_llava.data.missing import Presence, hash_rank, share_of
from delo_llava.data.rows import Reading, Row
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, Split, TaskSpec

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

#: Part of the cache key: a change of the rows must change it, or old caches would be read.
ROWS_VERSION = 6

#: Rows written at once; bounds the memory of the first read.
CHUNK = 8192

TEXTS = ("id", "image", "context", "instruction", "answer", "extra", "part")


class Records(Sequence[Record]):
    """The records of one (task, split), read from a mapped Arrow file on access.

    Args:
        path: the Arrow file.
        table: its content, mapped.
        chosen: rows that count, in this order; None means all.
    """

    def __init__(
        self,
        task: TaskSpec,
        split: Split,
        path: Path,
        table: "pa.Table",
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self.task, self.split, self.path = task.name, split, path
        self._spec, self._table, self._chosen = task, table, chosen
        self._columns = [table.column(name) for name in TEXTS[:6]]

    def __len__(self) -> int:
        return self._table.num_rows if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        place = range(len(self))[index]
        row = place if self._chosen is None else int(self._chosen[place])
        return _record(self._spec, self.split, [column[row].as_py() for column in self._columns])

    def __iter__(self) -> Iterator[Record]:
        if self._chosen is not None:
            yield from (self[place] for place in range(len(self)))
            return
        for batch in self._table.select(list(TEXTS[:6])).to_batches(max_chunksize=1024):
            columns = [column.to_pylist() for column in batch.columns]
            yield from (_record(self._spec, self.split, row) for row in zip(*columns, strict=True))

    def select(self, indices: Sequence[int]) -> "Records":
        """The records at `indices`, in that order, without copying."""
        rows = np.fromiter(indices, dtype=np.int64, count=len(indices))
        if len(rows) and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"an index is outside 0-{len(self) - 1}")
        rows = np.where(rows < 0, rows + len(self), rows)
        chosen = rows if self._chosen is None else self._chosen[rows]
        return Records(self._spec, self.split, self.path, self._table, chosen)

    @cached_property
    def ids(self) -> "Ids":
        """Every record's id, in order; made into strings on access."""
        column = self._table.column("id")
        return Ids(column if self._chosen is None else column.take(self._chosen))

    @cached_property
    def natural(self) -> Presence:
        """Whether each record has (image, context) in the data itself: boolean N×2."""
        columns = (self._table.column(name) for name in ("image", "context"))
        return self._kept(np.stack([column.is_valid().to_numpy() for column in columns], axis=1))

    @cached_property
    def characters(self) -> NDArray[np.int64]:
        """Characters of (instruction with answer, context) of each record: N×2."""
        import pyarrow.compute as pc

        instruction, answer, context = (
            pc.fill_null(pc.utf8_length(self._table.column(name)), 0).to_numpy().astype(np.int64)
            for name in ("instruction", "answer", "context")
        )
        return self._kept(np.stack([instruction + answer, context], axis=1))

    @property
    def entries(self) -> NDArray[np.int64]:
        """Number, in its file, of the entry that each record is of; one with several turns has several."""
        return self._kept(self._table.column("entry").to_numpy())

    @property
    def conversations(self) -> int:
        """How many entries the records are of."""
        return len(np.unique(self.entries))

    @property
    def dataset(self) -> "Dataset":
        """The same rows as a `datasets.Dataset` over the same mapped file."""
        from datasets import Dataset  # takes seconds to import

        whole = Dataset.from_file(str(self.path))
        return whole if self._chosen is None else whole.select(self._chosen)

    def _kept(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of one value for each stored row, those of the rows that count."""
        return values if self._chosen is None else values[self._chosen]


class Ids(Sequence[str]):
    """Record ids in an Arrow column: a million of them cost what they take as text."""

    def __init__(self, column: "pa.ChunkedArray") -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Ids": ...

    def __getitem__(self, index: int | slice) -> "str | Ids":
        if isinstance(index, slice):
            return Ids(self._column.take(np.arange(len(self))[index]))
        return str(self._column[range(len(self))[index]].as_py())

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def read_records(task: TaskSpec, split: Split, sub: float = 1.0, seed: int = 0) -> Records:
    """All records of a split, or a share of them, in the order of the file.

    Args:
        sub: share that is kept, in (0, 1]: drawn by record id, so a smaller share is part of a larger one.
        seed: seed of that draw.

    Raises:
        DeloError: a split the task does not have, or a fault in a file, told with file and entry.
    """
    path = _stored(task, split)
    records = Records(task, split, path, _mapped(path))
    if task.classes is not None:
        records = records.select(_rows_of_part(records, part_of(task.classes, split)))
    if sub == 1.0:
        return records
    ids = list(records.ids)
    ranked = sorted(range(len(ids)), key=lambda i: hash_rank(seed, task.name, split, ids[i]))
    return records.select(sorted(ranked[: max(1, share_of(sub, len(ids)))]))


def stream_records(task: TaskSpec, split: Split) -> Iterator[Record]:
    """The records of a split one after another, straight from its files, in bounded memory and uncached.

    Faults are told when they are reached, not before the first record.

    Raises:
        DeloError: as `read_records`.
    """
    part = None if task.classes is None else part_of(task.classes, split)
    for row in open_reading(task, split).rows():
        if row["part"] == part:
            yield record_of(task, split, row)


def open_reading(task: TaskSpec, split: Split, tell: Tell = stop) -> Reading:
    """One pass over a split's files, for readers that go on behind faults; a file of many tasks gives all.

    Args:
        tell: is told the faults of whole files.

    Raises:
        DeloError: a split that the task does not have.
    """
    if split not in task.files:
        raise DeloError(f"Task {task.name!r} has no {split} file.", given=split, allowed=task.files)
    images = EmbeddedImages(records_cache() / "images")
    return (Reading if task.classes is None else CmmlReading)(task, split, images, tell)


def records_cache() -> Path:
    """Where rows and embedded pictures are stored."""
    return cache_root() / "records"


def record_of(task: TaskSpec, split: Split, row: Row) -> Record:
    """A row as a record."""
    return _record(task, split, [row[name] for name in TEXTS[:6]])


def _record(task: TaskSpec, split: Split, row: Sequence[Any]) -> Record:
    """Stored values (in the order of `TEXTS`) as a record."""
    name, image, context, instruction, answer, extra = row
    path = task.images_of(split) / image if image else None
    return Record(name, task.name, split, path, context, instruction, answer, json.loads(extra))


def _rows_of_part(records: Records, part: str) -> list[int]:
    """The rows of one task and split, of a file that holds all of them."""
    import pyarrow.compute as pc

    column = records._table.column("part")
    chosen: list[int] = np.flatnonzero(pc.equal(column, part).to_numpy()).tolist()
    if not chosen:
        raise DeloError(
            f"The file of task {records.task!r} has no item of this task_id and split.",
            given=part,
            allowed=sorted(pc.unique(column).to_pylist()),
        )
    return chosen


def _stored(task: TaskSpec, split: Split) -> Path:
    """The Arrow file with a split's rows, made once for these files (path, size, time of change) and joins.

    Of several processes that ask at once, one writes and the others wait.
    """
    from filelock import FileLock

    found = open_reading(task, split).rows()
    path = records_cache() / f"{_key(task, split)}.arrow"
    if path.is_file():
        return path
    writable(path.parent)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".rows-")
            os.close(handle)
            try:
                _write(Path(draft), found)
                os.replace(draft, path)
            except BaseException:
                Path(draft).unlink(missing_ok=True)
                raise
    return path


def _key(task: TaskSpec, split: Split) -> str:
    """Names a split's rows: everything that they are a function of."""
    sides = [side for side in task.sides if split in side.splits]
    names = [task.classes.names] if task.classes is not None and task.classes.names else []
    files = [task.files[split], *(side.path for side in sides), *names]
    facts: dict[str, Any] = {
        "version": ROWS_VERSION,
        "root": str(task.images_of(split)),
        "files": [(str(file), *_state(file)) for file in files],
        "sides": [asdict(side) for side in sides],
        # One stored file serves all tasks and splits of a CMML file.
        "classes": None if task.classes is None else [task.classes.per_task, task.classes.instruction],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _state(file: Path) -> tuple[int, int]:
    """Size and time of change."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        raise DeloError("There is no such file of records.", given=file) from None
    return stat.st_size, stat.st_mtime_ns


def _write(path: Path, found: Iterator[Row]) -> None:
    """Write rows as an Arrow stream, some thousands at a time."""
    import pyarrow as pa

    fields = {name: pa.string() for name in TEXTS} | {"entry": pa.int64()}
    schema = pa.schema(fields)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while chunk := list(islice(found, CHUNK)):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))


def _mapped(path: Path) -> "pa.Table":
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
