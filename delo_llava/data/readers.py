"""Records from CoIN's JSON files: training conversations and test questions, kept memory mapped on disk."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from delo_llava.data.missing import hash_rank
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, Split, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_PLACEHOLDER = "<image>"

#: Part of the cache key: a change of `rows` below must change it, or old caches would be read.
ROWS_VERSION = 2

#: Keys of an entry that become fields of a record; all others are its `extra`.
FIELDS = {"id", "question_id", "image", "context", "conversations", "text", "answer"}


class Records(Sequence[Record]):
    """The records of one (task, split), read from an Arrow file on access.

    Attributes:
        conversations: entries of the JSON file; one with several turns gives several records.
    """

    def __init__(self, task: TaskSpec, split: Split, table: "Dataset") -> None:
        self._task, self._split, self._table = task, split, table
        self.ids: list[str] = list(table["id"])
        self.conversations = len(set(table["entry"]))

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._record(self._table[index])

    def __iter__(self) -> Iterator[Record]:
        return (self._record(row) for row in self._table)

    def select(self, indices: Sequence[int]) -> "Records":
        """The records at `indices`, in that order, without copying."""
        return Records(self._task, self._split, self._table.select(indices))

    def _record(self, row: dict[str, Any]) -> Record:
        """A stored row as a record."""
        image = self._task.image_root / row["image"] if row["image"] else None
        texts = {key: row[key] for key in ("context", "instruction", "answer")}
        extra = json.loads(row["extra"])
        return Record(
            id=row["id"], task=self._task.name, split=self._split, image=image, extra=extra, **texts
        )


def read_records(task: TaskSpec, split: Split, sub: float = 1.0, seed: int = 0) -> Records:
    """All records of a split, or a share of them, in the order of the file.

    Every turn pair of a conversation is one record with id `<id>#<turn>`. The first read of a file checks all
    of it and stores it as Arrow in the cache of `datasets`; later reads map that file.

    Args:
        sub: share that is kept, in (0, 1]: drawn by record id, so a smaller share is part of a larger one.
        seed: seed of that draw.

    Raises:
        DeloError: a split the task does not have, or a fault in the file, told with file and entry.
    """
    if split not in task.files:
        raise DeloError(f"Task {task.name!r} has no {split} file.", given=split, allowed=task.files)
    records = Records(task, split, _table(task.files[split], task.image_root))
    if sub == 1.0:
        return records
    ranked = sorted(range(len(records)), key=lambda i: hash_rank(seed, task.name, split, records.ids[i]))
    return records.select(sorted(ranked[: max(1, int(sub * len(records)))]))


def _table(path: Path, image_root: Path) -> "Dataset":
    """The file's rows as an Arrow table on disk, made once for this path, size and time of change."""
    import datasets  # takes seconds to import

    names = ("id", "image", "context", "instruction", "answer", "extra")
    texts = {name: datasets.Value("string") for name in names}
    stat = path.stat()
    key = {"size": stat.st_size, "changed": stat.st_mtime_ns, "version": ROWS_VERSION}
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            _keyed_rows,
            features=datasets.Features({**texts, "entry": datasets.Value("int64")}),
            gen_kwargs={"path": str(path), "image_root": str(image_root), "key": key},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DeloError):
            raise error.__cause__ from None
        raise
    finally:
        if shown:
            datasets.enable_progress_bars()


def _keyed_rows(path: str, image_root: str, key: dict[str, int]) -> Iterator[dict[str, Any]]:
    """`rows`, with the file's state among the arguments so that it is part of the cache key."""
    return rows(Path(path), Path(image_root))


def rows(path: Path, image_root: Path) -> Iterator[dict[str, Any]]:
    """Flat rows of a CoIN file: id, image, context, instruction, answer, extra, and the entry's number.

    Entries are conversations (`id`, `image`, `conversations`) or questions (`question_id`, `image`, `text`,
    `answer`), both with an optional `context`. Ids that repeat get `~2`, `~3` … in the order of the file;
    other keys go into `extra` (as JSON).

    Raises:
        DeloError: not a JSON array, or a fault in an entry.
    """
    seen: set[str] = set()
    for number, entry in enumerate(_entries(path)):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise DeloError(f"{where} is not an object.", given=repr(entry)[:80])
        name = _unique(str(entry.get("id", entry.get("question_id", number))), seen)
        where += f" (id {name})"
        shared = {
            "image": _image(entry, image_root, where),
            "context": _context(entry, where),
            "entry": number,
            "extra": json.dumps({key: value for key, value in entry.items() if key not in FIELDS}),
        }
        turns = list(_turns(entry, where))
        for turn, (instruction, answer) in enumerate(turns):
            unique = name if len(turns) == 1 else f"{name}#{turn}"
            yield {"id": unique, "instruction": instruction, "answer": answer, **shared}


def _entries(path: Path) -> list[Any]:
    """The JSON array in a file."""
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DeloError("There is no such file of records.", given=path) from None
    except ValueError as error:
        raise DeloError(f"This file is not valid JSON: {error}", given=path, fix="fetch it again") from error
    if not isinstance(content, list) or not content:
        raise DeloError("A file of records is a JSON array with at least one entry.", given=path)
    return content


def _unique(name: str, seen: set[str]) -> str:
    """`name`, or the first of `name~2`, `name~3` … that no earlier entry has."""
    unique, count = name, 1
    while unique in seen:
        count += 1
        unique = f"{name}~{count}"
    seen.add(unique)
    return unique


def _image(entry: dict[str, Any], root: Path, where: str) -> str | None:
    """The image's path relative to the root; it is checked as written, so links to other disks are fine."""
    given = entry.get("image")
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise DeloError(f"{where}: `image` must be one path.", given=repr(given)[:80])
    relative = os.path.relpath(os.path.normpath(root / given), root)
    if Path(relative).parts[0] == "..":
        raise DeloError(f"{where}: the image lies outside the image folder {root}.", given=given)
    return relative


def _context(entry: dict[str, Any], where: str) -> str | None:
    """The auxiliary text; an empty one is none."""
    given = entry.get("context")
    if given is not None and not isinstance(given, str):
        raise DeloError(f"{where}: `context` must be text.", given=repr(given)[:80])
    return (given or "").strip() or None


def _turns(entry: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """(instruction, answer) of every turn pair."""
    if "conversations" not in entry:
        yield _instruction(entry.get("text"), entry, where), _answer(entry.get("answer"), where)
        return
    turns = entry["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DeloError(f"{where}: `conversations` must be a list of turns.", given=repr(turns)[:80])
    roles = [turn.get("from") for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        raise DeloError(f"{where}: turns must alternate between human and gpt.", given=roles)
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        yield _instruction(human.get("value"), entry, where), _answer(gpt.get("value"), where)


def _instruction(given: object, entry: dict[str, Any], where: str) -> str:
    """What is asked, without the image's placeholder."""
    if not isinstance(given, str):
        raise DeloError(f"{where}: the instruction must be text.", given=repr(given)[:80])
    if IMAGE_PLACEHOLDER in given and not entry.get("image"):
        raise DeloError(f"{where}: the text has {IMAGE_PLACEHOLDER} but the entry names no image.")
    text = given.replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise DeloError(f"{where}: the instruction is empty.")
    return text


def _answer(given: object, where: str) -> str:
    """The reference answer as text; numbers are written out."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str) or not given.strip():
        raise DeloError(f"{where}: there is no answer.", given=repr(given)[:80])
    return given.strip()
