"""The template `neutral`: one wording for all tasks, and behind it only what tells a task's questions apart.

Its files lie beside the original ones (`science/train-neutral.json`), with a manifest of their own; records,
pictures, contexts and answers are the same. Where all questions of a task are one (`ocr`, `naming`,
`geography`, `unanswerable`, `grounding`), the wording alone is asked. `science` keeps its options, `yesno`
the word that is asked for, `attribute` which of two things is.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from delo_llava.errors import DeloError
from delo_llava.mini.entities import SPLITS
from delo_llava.mini.tasks import attribute

WORDING = "look at what is given and answer"
VERSION, SUFFIX, MANIFEST = "neutral-v1", "-neutral", "manifest-neutral.json"

_OPTIONS = re.compile(r"A\. \w+ B\. \w+ C\. \w+")
_ASKED = re.compile(r"^(?:is there an?|does the image contain an?|is an?) (\w+)")


def _options(instruction: str) -> str:
    """`A. six B. one C. zero`."""
    found = _OPTIONS.search(instruction)
    return found.group() if found else ""


def _asked_for(instruction: str) -> str:
    """The colour or form that a scene may hold."""
    found = _ASKED.match(instruction)
    return found.group(1) if found else ""


def _which(instruction: str) -> str:
    """`colour` or `form`."""
    return next((name for name, forms in attribute.INSTRUCTIONS.items() if instruction in forms), "")


#: Task -> what is left of an instruction.
CONTENT: Mapping[str, Callable[[str], str]] = {
    "science": _options,
    "yesno": _asked_for,
    "attribute": _which,
}


def neutral(task: str, instruction: str) -> str:
    """The instruction of a record in the one wording.

    Raises:
        ValueError: it is none of the task's.
    """
    if task not in CONTENT:
        return WORDING
    content = CONTENT[task](instruction)
    if not content:
        raise ValueError(f"{instruction!r} is no instruction of {task}")
    return f"{WORDING}: {content}"


def ensure_neutral(folder: Path, tasks: tuple[str, ...]) -> None:
    """Write a built collection's neutral files, or prove the ones that are there.

    Raises:
        DeloError: a file no longer has the recorded hash.
    """
    if (folder / MANIFEST).is_file():
        _verify(folder)
        return
    hashes = {}
    for task in tasks:
        for split in SPLITS:
            rows = json.loads((folder / task / f"{split}.json").read_text(encoding="utf-8"))
            text = json.dumps([_row(task, row) for row in rows], indent=1)
            name = f"{task}/{split}{SUFFIX}.json"
            _write(folder / name, text)
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    _write(folder / MANIFEST, json.dumps({"version": VERSION, "files": hashes}, indent=1))


def _write(path: Path, text: str) -> None:
    """Put a file there in one step: of two processes at once, each puts the same."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _row(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A record of either form with its instruction replaced."""
    if "text" in row:
        return {**row, "text": neutral(task, row["text"])}
    human, gpt = row["conversations"]
    picture, _, instruction = human["value"].rpartition("\n")
    asked = {**human, "value": f"{picture}\n{neutral(task, instruction)}"}
    return {**row, "conversations": [asked, gpt]}


def _verify(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise DeloError(
                "a file of the built data has changed",
                given=path,
                fix=f"delete {folder / MANIFEST}; the neutral files are written anew at the next use",
            )
