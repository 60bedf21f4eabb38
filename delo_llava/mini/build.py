"""Build mini6, mini8 and what is kept aside of them at first use: CoIN's records, 64x64 pictures of packages.

The folder appears at once or not at all (temporary folder, manifest, rename), so two processes that start
together cannot harm each other: the slower one finds the finished folder and drops its own.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from delo_llava.cache import cache_root, writable
from delo_llava.errors import DeloError
from delo_llava.extras import require_extra
from delo_llava.mini.entities import SPLITS, Split
from delo_llava.mini.neutral import ensure_neutral
from delo_llava.mini.tasks.base import Example, Records

COUNTS: dict[Split, int] = {"train": 1600, "val": 200, "test": 300}
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Collection:
    """What one folder of built data holds.

    Attributes:
        version: the folder's name, with the number of the data's edition.
        seeds: task -> what its random numbers are drawn from, in the order in which the tasks are learned. A
            task that two collections share has one seed, so its records are the same in both. A seed names
            the edition in which the task was first drawn: a later one keeps every record that may stay.
        splits: that its tasks have.
    """

    name: str
    version: str
    seeds: Mapping[str, str]
    splits: tuple[Split, ...] = SPLITS

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in order."""
        return tuple(self.seeds)


_SIX = ("science", "ocr", "naming", "yesno", "attribute", "geography")
MINI6 = Collection("mini6", "mini6-v2", {task: f"mini6-v1/{task}" for task in _SIX})
_NEW = ("unanswerable", "grounding")
_SEEDS = {**MINI6.seeds, **{task: f"mini8-v1/{task}" for task in _NEW}}
MINI8 = Collection("mini8", "mini8-v2", {t: _SEEDS[t] for t in (*_SIX[:4], *_NEW, *_SIX[4:])})
_ASIDE = ("numerals", "notes")
#: Tasks that no stage of mini6 or mini8 trains, in a folder of their own.
ASIDE = Collection("mini-aside", "mini-aside-v1", {t: f"mini-aside-v1/{t}" for t in _ASIDE}, ("test",))
COLLECTIONS = {c.name: c for c in (MINI6, MINI8)}


def ensure_mini6(root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """`ensure` for mini6."""
    return ensure(MINI6, root, counts)


def ensure_mini8(root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """`ensure` for mini8."""
    return ensure(MINI8, root, counts)


def ensure_neutral_mini6(root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """`ensure` for mini6 with the files of its template `neutral`."""
    return _with_neutral(MINI6, ensure_mini6(root, counts))


def ensure_neutral_mini8(root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """`ensure` for mini8 with the files of its template `neutral`."""
    return _with_neutral(MINI8, ensure_mini8(root, counts))


def _with_neutral(collection: Collection, folder: Path) -> Path:
    ensure_neutral(folder, collection.tasks)
    return folder


def ensure_aside(root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """`ensure` for the tasks kept aside."""
    return ensure(ASIDE, root, counts)


def ensure(collection: Collection, root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """The folder of a collection, built when it is not there yet (some seconds on one core).

    Args:
        root: the folder that holds the collection's; the cache by default.
        counts: records per split of each task; tests ask for fewer.

    Raises:
        DeloError: a file of a finished folder no longer has the recorded hash, or nothing is there and the
            packages to build it with are not installed.
    """
    folder = (root or cache_root()) / collection.version
    if (folder / MANIFEST).is_file():
        verify(folder)
        return folder
    require_extra("mini", f"Building {collection.name}")
    if root is None:
        writable(folder.parent)
    else:
        root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{collection.version}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / collection.version
        for task, seed in collection.seeds.items():
            build_task(draft, task, seed, {split: counts[split] for split in collection.splits})
        manifest = json.dumps(describe(draft, collection), indent=1)
        (draft / MANIFEST).write_text(manifest, encoding="utf-8")
        _publish(draft, folder)
    return folder


def _publish(draft: Path, folder: Path) -> None:
    """Rename the draft into place unless another process was faster; leftovers make way."""
    if folder.exists() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        draft.replace(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def build_task(root: Path, task: str, seed: str, counts: Mapping[Split, int]) -> None:
    """Write one task's JSON files and pictures below `root`; its random numbers follow from `seed`.

    A picture that an earlier split shows is left out and the next one taken: maps without their dot differ in
    their paper's colour only, and some colours are drawn twice.
    """
    records: Records = import_module(f"delo_llava.mini.tasks.{task}").records
    shown: set[bytes] = set()
    for split in (split for split in SPLITS if split in counts):
        images = root / task / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        number = int(hashlib.sha256(f"{seed}/{split}".encode()).hexdigest()[:16], 16)
        drawn = records(split, np.random.default_rng(number))
        fresh = (example for example in drawn if _pixels(example) not in shown)
        examples = list(islice(fresh, counts[split]))
        shown |= {example.image.tobytes() for example in examples if example.image is not None}
        rows = [_write(root, task, split, index, example) for index, example in enumerate(examples)]
        (root / task / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _pixels(example: Example) -> bytes | None:
    return None if example.image is None else example.image.tobytes()


def _write(root: Path, task: str, split: Split, index: int, example: Example) -> dict[str, Any]:
    """Save the picture and return the record: conversations for train and val, question rows for test."""
    picture = f"{task}/images/{split}/{index:05d}.png"
    if example.image is not None:
        example.image.save(root / picture, compress_level=1)
    name = f"{task}-{split}-{index:05d}"
    sources = [n for n, there in (("image", example.in_image), ("context", example.in_context)) if there]
    shared: dict[str, Any] = {"image": picture} if example.image is not None else {}
    shared |= {"context": example.context, "entity": example.entity}
    shared["answer_in"] = "+".join(sources) or "neither"
    shared |= example.extra
    if split == "test":
        return {"question_id": name, "text": example.instruction, "answer": example.answer, **shared}
    opening = "" if example.image is None else "<image>\n"
    human = {"from": "human", "value": f"{opening}{example.instruction}"}
    return {"id": name, "conversations": [human, {"from": "gpt", "value": example.answer}], **shared}


def describe(folder: Path, collection: Collection) -> dict[str, Any]:
    """The manifest: version, sha256 of every JSON file, and one over all pixels of each task and split."""
    parts = [(task, split) for task in collection.tasks for split in collection.splits]
    files = {f"{t}/{s}.json": _sha256(folder / t / f"{s}.json") for t, s in parts}
    pictures = {f"{t}/images/{s}": _pictures(folder / t / "images" / s) for t, s in parts}
    return {"version": collection.version, "files": files, "pictures": pictures}


def _pictures(folder: Path) -> dict[str, Any]:
    """How many pictures a folder holds and one hash over all of them in order."""
    contents = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    return {"count": len(contents), "sha256": hashlib.sha256(b"".join(contents)).hexdigest()}


def verify(folder: Path) -> None:
    """Compare the JSON files' hashes and the pictures' numbers with the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise DeloError(
                "a file of the built data has changed",
                given=path,
                fix=f"delete {folder}; it is built anew at the next use",
            )
    for name, facts in manifest["pictures"].items():
        found = sum(1 for entry in os.scandir(folder / name) if entry.name.endswith(".png"))
        if found != facts["count"]:
            raise DeloError(
                f"{facts['count']} pictures belong in {name}, {found} are there", given=folder / name,
                fix=f"delete {folder}; it is built anew at the next use",
            )  # fmt: skip


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
