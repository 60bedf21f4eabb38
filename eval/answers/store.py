"""Answers on disk: what was said to each question, kept apart from scores, so no question is answered twice.

`answers/<stage>/<pattern>/<task>.jsonl`, one answer a line with its key (`keys.py`) and a checksum.
While an evaluation runs, every process appends to a part file of its own beside it; a killed one leaves its
part, and the next launch, of any number of ranks, goes on from there. The first rank joins them at the end.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from delo_eval.answers.hashes import ANSWERS, digest, told_writing
from delo_eval.answers.question import Answer
from delo_eval.matrix.accuracy import stage_name
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic

logger = logging.getLogger(__name__)

#: (key, record id, answer) of one question.
StoredAnswer = tuple[str, str, Answer]


class CellAnswers:
    """The stored answers of one cell.

    Attributes:
        damaged: lines that could not be used, as `file, line n`, found by the latest `read`.
    """

    def __init__(self, output: Path, stage: int, pattern: str, task: str) -> None:
        self.file = output / ANSWERS / stage_name(stage) / pattern / f"{task}.jsonl"
        self.damaged: list[str] = []
        self._joined: list[str] = []
        self._whole = False

    def read(self) -> dict[str, StoredAnswer]:
        """Key -> entry of every whole line, of the joined file and of all parts.

        A line whose checksum does not fit is told (once) and left out, so that its question is asked again.
        The last line of a part may be torn, as a killed process leaves it: it is left out without a word.
        """
        told, self.damaged = set(self.damaged), []
        found = {entry[0]: entry for entry in self._entries(self.file)}
        self._joined = list(found)
        parts = self._parts()
        self._whole = not parts
        for part in parts:
            found.update((entry[0], entry) for entry in self._entries(part))
        for place in self.damaged:
            if place not in told:
                logger.warning("A stored answer is damaged and is given again: %s", place)
        return found

    @contextmanager
    def writer(self, rank: int) -> Iterator["PartWriter"]:
        """A part file of this process's own, flushed to the disk at the end; none stays if nothing came.

        Raises:
            DeloError: the disk is full, or the folder cannot be written.
        """
        with told_writing(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle = self._open_part(rank)
        try:
            yield PartWriter(handle, self.file.parent)
        finally:
            with told_writing(self.file.parent):
                os.fsync(handle.fileno())
                handle.close()

    def join(self, context: str, keys: Sequence[str], known: dict[str, StoredAnswer]) -> None:
        """Put the answers of `keys`, in that order, into the joined file and drop the finished parts.

        Args:
            context: first letters of the keys of the same model, settings and code.
            known: what `read` just gave.

        Further answers of the same `context` (asked with another limit) are kept after them; all others are
        of a model, code or setting that is gone. A part that another process is still writing stays.

        Raises:
            DeloError: as `writer`.
        """
        asked = set(keys)
        kept = [*keys, *(key for key in known if key not in asked and key.startswith(context))]
        with told_writing(self.file.parent):
            if kept != self._joined or self.damaged or not self._whole:
                write_text_atomic(self.file, "".join(_line(known[key]) for key in kept))
            for part in self._parts():
                _remove_if_left(part)

    def forget(self) -> None:
        """Drop the stored answers, except what another process is writing just now."""
        with told_writing(self.file.parent):
            self.file.unlink(missing_ok=True)
            for part in self._parts():
                _remove_if_left(part)

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f".{self.file.stem}.part-*"))

    def _open_part(self, rank: int) -> IO[bytes]:
        """A new part, locked for as long as this process lives; the lock says that it is still written."""
        for number in range(1000):
            path = self.file.with_name(f".{self.file.stem}.part-{rank}-{os.getpid()}-{number}")
            try:
                handle = path.open("xb")
            except FileExistsError:
                continue
            fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists():  # not taken for a dead process's before it was locked
                return handle
            handle.close()
        raise DeloError("No new file of answers could be made.", given=self.file.parent)

    def _entries(self, file: Path) -> Iterator[StoredAnswer]:
        """The whole lines of one file; what is wrong with others goes into `damaged`."""
        if not file.is_file():
            return
        *lines, rest = file.read_bytes().split(b"\n")
        if rest and file == self.file:  # a joined file is published whole: somebody cut it
            lines.append(rest)
        for number, line in enumerate(lines, start=1):
            entry = _parsed(line)
            if entry is None:
                self.damaged.append(f"{file}, line {number}")
            else:
                yield entry


class PartWriter:
    """Appends answers, a batch at a time and whole lines only."""

    def __init__(self, handle: IO[bytes], folder: Path) -> None:
        self._handle, self._folder = handle, folder

    def append(self, entries: Iterable[StoredAnswer]) -> None:
        """Write the answers of one batch; they outlive this process from here on.

        Raises:
            DeloError: the disk is full, or the folder cannot be written.
        """
        with told_writing(self._folder):
            self._handle.write("".join(map(_line, entries)).encode())
            self._handle.flush()


def _remove_if_left(part: Path) -> None:
    """Remove a part, unless a living process holds its lock."""
    with part.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        part.unlink(missing_ok=True)


def _line(entry: StoredAnswer) -> str:
    """One answer as a line that can prove itself."""
    key, record_id, answer = entry
    body = {"key": key, "record_id": record_id, "answer": asdict(answer)}
    return json.dumps({**body, "check": _check(body)}, ensure_ascii=False) + "\n"


def _parsed(line: bytes) -> StoredAnswer | None:
    """The answer in a line, None where the line is not what was written."""
    try:
        body: dict[str, Any] = json.loads(line)
        if body.pop("check") != _check(body):
            return None
        return body["key"], body["record_id"], _answer(body["answer"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _answer(body: dict[str, Any]) -> Answer:
    """An answer from JSON, which has no tuples; lines from before there were some of them have none."""
    return Answer(**body | {key: tuple(body.get(key, ())) for key in ("fallback", "cut", "unended")})


def _check(body: dict[str, Any]) -> str:
    return digest(body)[:16]
