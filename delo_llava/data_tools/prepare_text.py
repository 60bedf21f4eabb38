"""Captions, OCR tokens and hints of official downloads, as a side file or as the context of records."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from delo_llava.data.entries import read_entries, read_members
from delo_llava.data.layouts import name_of
from delo_llava.data_tools.prepared import Preparation
from delo_llava.errors import DeloError


def coco_captions(path: Path) -> dict[str, str]:
    """Number of the image -> its captions, from COCO's `captions_*.json`."""
    texts: dict[str, list[str]] = {}
    for row in read_entries(path, "annotations"):
        texts.setdefault(str(int(row["image_id"])), []).append(str(row["caption"]).strip())
    return {key: " ".join(captions) for key, captions in texts.items()}


def ocr_tokens(path: Path) -> dict[str, str]:
    """Image id -> its OCR tokens, from TextVQA's Rosetta files."""
    return {str(row["image_id"]): " ".join(map(str, row["ocr_tokens"])) for row in read_entries(path, "data")}


def hints(path: Path) -> dict[str, str]:
    """Problem -> its hint, from ScienceQA's problems.json."""
    return {key: str(row.get("hint") or "").strip() for key, row in read_members(path)}


def text_map(path: Path) -> dict[str, str]:
    """Image (path, file name or stem) or id -> text, from a side file `{key: text}`."""
    return {key: str(text).strip() for key, text in read_members(path)}


#: Kind -> (how its texts are read, keys of an entry to look under, the first that is there counts).
KINDS: dict[str, tuple[Callable[[Path], dict[str, str]], tuple[str, ...]]] = {
    "coco": (coco_captions, ("image_number",)),
    "ocr": (ocr_tokens, ("image_stem",)),
    "hints": (hints, ("id",)),
    "map": (text_map, ("image", "image_name", "image_stem", "image_number", "id")),
}


def texts_of(kind: str, path: Path) -> dict[str, str]:
    """Key -> text of a download, empty ones left out.

    Raises:
        DeloError: not of this kind.
    """
    try:
        texts = {key: text for key, text in KINDS[kind][0](path).items() if text}
    except (DeloError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeloError(f"This file is not of the kind {kind!r}: {error}.", given=path) from error
    if not texts:
        raise DeloError(f"This file holds no texts of the kind {kind!r}.", given=path, allowed=KINDS)
    return texts


def side_file(source: Path, kind: str, made: Preparation) -> bool:
    """A side file `{key: text}` from a download.

    Raises:
        DeloError: as `texts_of`.
    """
    made.source(source)
    if made.is_done():
        return False
    texts = texts_of(kind, source)
    made.write_value(made.target, texts)
    made.counts["keys"] = len(texts)
    return made.publish()


def join(records: Path, side: Path, kind: str, made: Preparation) -> bool:
    """The entries of a file with texts added to their context.

    Raises:
        DeloError: as `texts_of`; no entry has a text.
    """
    made.source(records)
    made.source(side)
    if made.is_done():
        return False
    texts = texts_of(kind, side)
    names = KINDS[kind][1]
    if all(_found(entry, names, texts) is None for entry in read_entries(records)):
        told = f"{side}, keys such as {', '.join(list(texts)[:3])}"
        raise DeloError("No entry has a text in the side file.", given=told)
    used: set[str] = set()
    count = made.write_entries(made.target, _joined(records, texts, names, used, made))
    made.counts |= {"entries": count, "keys_used": len(used), "keys_unused": len(texts) - len(used)}
    return made.publish()


def _joined(
    records: Path, texts: dict[str, str], names: tuple[str, ...], used: set[str], made: Preparation
) -> Iterator[dict[str, Any]]:
    without = 0
    for number, entry in enumerate(read_entries(records)):
        if not isinstance(entry, dict):
            raise DeloError(f"{records}, entry {number} is no object.", fix="run `delo-llava data check`")
        if (key := _found(entry, names, texts)) is None:
            without += 1
            yield entry
        else:
            used.add(key)
            before = str(entry.get("context") or "").strip()
            yield {**entry, "context": "\n".join(filter(None, (before, texts[key])))}
    made.counts["entries_without_text"] = without


def _found(entry: Any, names: tuple[str, ...], texts: dict[str, str]) -> str | None:
    """The first of an entry's keys that has a text."""
    if not isinstance(entry, dict):
        return None
    return next((key for name in names if (key := _key(name, entry)) in texts), None)


def _key(name: str, entry: dict[str, Any]) -> str:
    """What an entry is looked up under."""
    if name == "id":
        return str(name_of(entry, ""))
    path = PurePosixPath(str(entry.get("image") or ""))
    if name == "image_number":
        digits = re.search(r"\d+$", path.stem)
        return str(int(digits[0])) if digits else ""
    return {"image": str(path), "image_name": path.name, "image_stem": path.stem}[name]
