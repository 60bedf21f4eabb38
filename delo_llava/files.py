"""Files written in one step, flushed to the disk; hashes of files, remembered by size and time."""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from delo_llava.errors import DeloError
from delo_llava.strict import read_json

_DRAFT = re.compile(r"\..+\.\d+\.tmp")


def at_home(path: Path | str) -> Path:
    """`path` as typed, but that a leading `~` is the home folder, as shells mean it.

    Raises:
        ValueError: `~somebody`, who is unknown here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: whose home folder?") from error


def name_or_path(given: str) -> str:
    """A name as typed, or a path whose leading `~` is the home folder."""
    return str(at_home(given)) if given.startswith("~") else given


def user_path(text: str) -> Path:
    """A path on a command line (argparse's `type`)."""
    try:
        return at_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class HashCache:
    """sha256 of files, computed again only where size or modification time changed.

    Args:
        path: JSON file that remembers {absolute path: [size, mtime_ns, sha256]}.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fix = "remove it: the files are hashed again"
        self.known: dict[str, list[Any]] = (
            read_json(path, "The memory of hashes", fix) if path.is_file() else {}
        )

    def hash(self, path: Path) -> str:
        """The sha256 of one file.

        Raises:
            DeloError: there is no such file.
        """
        if not path.is_file():
            raise DeloError(
                "A file that the run needs is missing",
                given=path,
                fix="put it back, or check the data's root",
            )
        status = path.stat()
        entry = self.known.get(str(path))
        if not isinstance(entry, list) or entry[:2] != [status.st_size, status.st_mtime_ns]:
            entry = [status.st_size, status.st_mtime_ns, sha256_file(path)]
            self.known[str(path)] = entry
        return str(entry[2])

    def save(self) -> None:
        """Write the memory back."""
        write_json_atomic(self.path, self.known)


def combined_hash(cache: HashCache, files: Iterable[Path]) -> str:
    """One sha256 over the names and contents of `files`, in the order of their names."""
    lines = [f"{file.name} {cache.hash(file)}" for file in sorted(files, key=lambda f: f.name)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by the JSON of `value` in one step: a reader sees the old file or the new one, whole."""
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, flushed to the disk before the name changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(path)
    fsync(path.parent)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts that killed processes left of `write_text_atomic` anywhere below `folder`."""
    for path in folder.rglob(".*.tmp"):
        if _DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush one file, or one folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
