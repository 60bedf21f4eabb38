"""What an evaluation depends on beside code: versions, and files by their hashes, kept beside the answers."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from delo_llava.errors import DeloError
from delo_llava.files import HashCache

logger = logging.getLogger(__name__)

_SHA256 = re.compile("[0-9a-f]{64}")

#: Folder of the answers, their hashes and receipts below an evaluation's output.
ANSWERS = "answers"
#: Packages whose version may decide an answer.
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "flash-attn", "numpy", "pillow",
    "torchvision",
)  # fmt: skip


class FileHashes:
    """sha256 of images and of the base's files, remembered by size and time in the folder of the answers.

    Several ranks each write a memory of their own; the first takes in the others' at the end.
    """

    def __init__(self, output: Path, rank: int = 0) -> None:
        self._folder = output / ANSWERS
        shared = _memory(self._folder / "hashes.json")
        self.cache = shared if rank == 0 else _memory(self._folder / f".hashes.part{rank}")
        self._saved = dict(self.cache.known)
        self.cache.known = {**shared.known, **self.cache.known}
        #: Every file that was asked for, with its hash; None where there was none.
        self.seen: dict[Path, str | None] = {}

    def of(self, path: Path) -> str | None:
        """The hash, or None where there is no such file; each file is looked at once."""
        if path not in self.seen:
            self.seen[path] = self.cache.hash(path) if path.is_file() else None
        return self.seen[path]

    def take_parts(self) -> None:
        """Learn what the other ranks hashed (first rank, when they are done)."""
        for part in self._folder.glob(".hashes.part*"):
            self.cache.known.update(_memory(part).known)
            part.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the memory back, if it changed.

        Raises:
            DeloError: the disk is full, or the folder cannot be written.
        """
        if self._saved != self.cache.known:
            with told_writing(self._folder):
                self.cache.save()
            self._saved = dict(self.cache.known)


def _memory(path: Path) -> HashCache:
    """The memory in a file; what is damaged of it is dropped, as files can be hashed again.

    Raises:
        DeloError: a damaged file cannot be removed.
    """
    try:
        memory = HashCache(path)
    except DeloError as fault:
        logger.warning("%s: it is dropped, and files are hashed again", fault.message)
        with told_writing(path.parent):
            path.unlink(missing_ok=True)
        return HashCache(path)
    memory.known = {file: entry for file, entry in memory.known.items() if _is_entry(entry)}
    return memory


def _is_entry(entry: Any) -> bool:
    """Whether this is [size, mtime_ns, sha256]."""
    match entry:
        case [int(), int(), str(sha)]:
            return _SHA256.fullmatch(sha) is not None
    return False


def digest(value: Any) -> str:
    """sha256 of a value's JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str | None]:
    """The installed version of each of `PACKAGES`."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def told_writing(folder: Path) -> Iterator[None]:
    """Tell what to do when the disk does not take what the block writes below `folder`.

    Raises:
        DeloError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        there = next((place for place in (folder, *folder.parents) if place.is_dir()), Path("."))
        raise DeloError(
            f"The evaluation cannot be written: {error.strerror or error}.",
            given=f"{error.filename or folder} ({shutil.disk_usage(there).free >> 20} MiB free)",
            fix="make room or rights there, or name another folder with --output; the same command goes on "
            "with the answers already written, and earlier results are as they were",
        ) from error
