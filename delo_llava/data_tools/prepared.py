"""Prepared data: written at once or not at all, never over other files, with a manifest of its sources."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delo_llava import __version__
from delo_llava.data.entries import plain
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file, write_json_atomic
from delo_llava.strict import read_json

#: Name of the manifest: this, behind the name of the file when a single one is prepared.
MANIFEST = "prepared.json"


@dataclass
class Preparation:
    """One call of `data prepare`.

    Attributes:
        what: the word of the command line.
        target: the file or the folder that is made, absolute.
        options: what else decides the outcome.
        force: write over files that are there.
        sources: absolute path -> sha256 of every file that was read.
        files: path -> sha256 of every file that was written.
        notes: what whoever uses the data must know.
        counts: what the data holds.
    """

    what: str
    target: Path
    options: dict[str, Any]
    force: bool = False
    sources: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    _mine: set[str] = field(default_factory=set)

    @property
    def manifest(self) -> Path:
        """Where the manifest is: in the folder, or beside the file."""
        if self.target.suffix:
            return self.target.with_name(f"{self.target.name}.{MANIFEST}")
        return self.target / MANIFEST

    def source(self, path: Path) -> Path:
        """Note a file that is read, with its hash; returns it.

        Raises:
            DeloError: there is no such file.
        """
        if not path.is_file():
            raise DeloError("A file that this is prepared from is missing.", given=path)
        self.sources[str(path.absolute())] = sha256_file(path)
        return path

    def is_done(self) -> bool:
        """Whether the same was prepared before, from the same sources, and is still there unchanged."""
        before = self._before()
        if before is None or self.force:
            return False
        self._mine = set(before["files"])
        return bool(before["complete"]) and all(
            Path(name).is_file() and sha256_file(Path(name)) == digest
            for name, digest in before["files"].items()
        )

    def _before(self) -> dict[str, Any] | None:
        """The manifest of the same preparation, finished or killed; None where there is none."""
        if not self.manifest.is_file():
            return None
        before = read_json(self.manifest, "The manifest of a preparation", "remove it and prepare anew")
        same = ("what", "options", "sources")
        if any(before.get(key) != getattr(self, key) for key in same):
            return None
        return before

    def write_entries(self, path: Path, entries: Iterable[Mapping[str, Any]]) -> int:
        """Write a JSON array (JSON lines by suffix), one entry a line; returns how many.

        Raises:
            DeloError: the file is there and `force` is not given.
        """
        self._claim(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        begin, between, end = ("", "\n", "\n") if path.suffix.lower() == ".jsonl" else ("[\n", ",\n", "\n]\n")
        count = 0
        try:
            with draft.open("w", encoding="utf-8") as file:
                for entry in entries:
                    file.write(
                        (between if count else begin) + json.dumps(entry, ensure_ascii=False, default=plain)
                    )
                    count += 1
                file.write(end if count else "[]\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        self.files[str(path)] = sha256_file(path)
        return count

    def write_value(self, path: Path, value: Any) -> None:
        """Write one JSON value.

        Raises:
            DeloError: as `write_entries`.
        """
        self._claim(path)
        write_json_atomic(path, value)
        self.files[str(path)] = sha256_file(path)

    def link(self, path: Path, target: Path) -> None:
        """Make a symbolic link; one that leads there already is left.

        Raises:
            DeloError: something else is there.
        """
        target = target.absolute()
        if path.is_symlink() and Path(os.readlink(path)) == target:
            return
        self.require_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        path.symlink_to(target)

    def require_free(self, path: Path) -> None:
        """Refuse to write over what is there; a folder is never replaced."""
        if path.is_dir() and not path.is_symlink():
            raise DeloError("A folder is in the way.", given=path, fix="name another --to")
        taken = path.exists() or path.is_symlink()
        if taken and not self.force and str(path) not in self._mine:
            raise DeloError(
                "This file is there already, and was not made from the same sources with the same options.",
                given=path,
                fix="name another --to, or write over it with --force",
            )

    def publish(self) -> bool:
        """Write the manifest, last; true."""
        self._write_manifest(complete=True)
        return True

    def _claim(self, path: Path) -> None:
        """Say in the manifest, before a file is written, that it is ours: a killed preparation goes on."""
        self.require_free(path)
        self.files[str(path)] = ""
        self._write_manifest(complete=False)

    def _write_manifest(self, complete: bool) -> None:
        names = ("what", "options", "sources", "files", "notes", "counts")
        facts = {name: getattr(self, name) for name in names}
        about = {"schema": 1, "delo_llava": __version__, "complete": complete}
        write_json_atomic(self.manifest, about | facts)
