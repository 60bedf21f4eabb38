"""Build mini6 at first use: six tasks of records and 64x64 pictures in CoIN's format, from packages' data.

The folder appears at once or not at all (temporary folder, manifest, rename), so two processes that start
together cannot harm each other: the slower one finds the finished folder and drops its own.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from delo_llava.errors import DeloError
from delo_llava.mini.entities import SPLITS, Split
from delo_llava.mini.tasks.base import Example, Records

VERSION = "mini6-v1"
TASKS = ("science", "ocr", "naming", "yesno", "attribute", "geography")
COUNTS: dict[Split, int] = {"train": 1600, "val": 200, "test": 300}
MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Where built data lives: DELO_LLAVA_CACHE, else ~/.cache/delo_llava."""
    return Path(os.environ.get("DELO_LLAVA_CACHE") or Path.home() / ".cache" / "delo_llava")


def ensure_mini6(root: Path | None = None, counts: Mapping[Split, int] = COUNTS) -> Path:
    """The folder of mini6, built when it is not there yet (some seconds on one core).

    Args:
        root: the folder that holds `mini6-v1`; the cache by default.
        counts: records per split of each task; tests ask for fewer.

    Raises:
        DeloError: a file of a finished folder no longer has the recorded hash.
    """
    folder = (root or cache_root()) / VERSION
    if (folder / MANIFEST).is_file():
        verify(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{VERSION}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / VERSION
        for task in TASKS:
            build_task(draft, task, counts)
        (draft / MANIFEST).write_text(json.dumps(describe(draft), indent=1), encoding="utf-8")
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


def build_task(root: Path, task: str, counts: Mapping[Split, int]) -> None:
    """Write one task's JSON files and pictures below `root`."""
    records: Records = import_module(f"delo_llava.mini.tasks.{task}").records
    for split in SPLITS:
        images = root / task / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        seed = int(hashlib.sha256(f"{VERSION}/{task}/{split}".encode()).hexdigest()[:16], 16)
        examples = islice(records(split, np.random.default_rng(seed)), counts[split])
        rows = [_write(root, task, split, index, example) for index, example in enumerate(examples)]
        (root / task / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _write(root: Path, task: str, split: Split, index: int, example: Example) -> dict[str, Any]:
    """Save the picture and return the record: conversations for train and val, question rows for test."""
    picture = f"{task}/images/{split}/{index:05d}.png"
    example.image.save(root / picture, compress_level=1)
    name = f"{task}-{split}-{index:05d}"
    shared = {"image": picture, "context": example.context, "entity": example.entity}
    shared["answer_in"] = "+".join(
        n for n, there in (("image", example.in_image), ("context", example.in_context)) if there
    )
    if split == "test":
        return {"question_id": name, "text": example.instruction, "answer": example.answer, **shared}
    human = {"from": "human", "value": f"<image>\n{example.instruction}"}
    return {"id": name, "conversations": [human, {"from": "gpt", "value": example.answer}], **shared}


def describe(folder: Path) -> dict[str, Any]:
    """The manifest: version, sha256 of every JSON file, and one over all pixels of each task and split."""
    files = {f"{t}/{s}.json": _sha256(folder / t / f"{s}.json") for t in TASKS for s in SPLITS}
    pictures = {f"{t}/images/{s}": _pictures(folder / t / "images" / s) for t in TASKS for s in SPLITS}
    return {"version": VERSION, "files": files, "pictures": pictures}


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
                "a file of the built mini6 data has changed",
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
