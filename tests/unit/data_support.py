"""A small clean set in CoIN's formats, for tests of the data tools to spoil."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def picture(path: Path, number: int) -> None:
    """A PNG whose bytes no other number has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (number % 256, number // 256, 77)).save(path)


def bomb(path: Path) -> None:
    """A PNG of some hundred bytes that claims 50000x50000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def talk(name: Any, image: str | None, *turns: str, **more: Any) -> dict[str, Any]:
    """A training entry with alternating turns; the first one shows the image."""
    values = [f"<image>\n{turns[0]}" if image else turns[0], *turns[1:]]
    said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": name, "conversations": said, **({"image": image} if image else {}), **more}


class Sequence:
    """A recipe `mine` with one task: 12 training entries (some with two turns, one without image), 6 tests.

    Attributes:
        train, test: the entries, to be changed and written again.
    """

    def __init__(self, folder: Path, scorer: str = "exact_match") -> None:
        self.folder, self.images = folder, folder / "images"
        for number in range(18):
            picture(self.images / f"{number}.png", number)
        self.train = [
            talk(f"a{i}", f"{i}.png", f"what color is it, {i}?", "blue", context=f"hint {i}")
            for i in range(8)
        ]
        self.train += [
            talk(f"m{i}", f"{i}.png", "what is it?", "a circle", "and the color?", "red") for i in (8, 9, 10)
        ]
        self.train += [talk("text", None, "is red a color?", "yes")]
        self.test: list[Any] = [
            {"question_id": f"q{i}", "image": f"{i}.png", "text": f"what color is it, {i}?", "answer": "red"}
            for i in range(12, 18)
        ]
        task = {"name": "one", "kind": "vqa", "image_root": "images", "scorer": scorer}
        task["files"] = {"train": "train.json", "test": "test.json"}  # type: ignore[assignment]
        self.recipe = folder / "mine.yaml"
        self.recipe.write_text(json.dumps({"name": "mine", "tasks": [task]}))  # JSON is YAML
        self.write()

    def write(self) -> None:
        """Write the entries."""
        for split in ("train", "test"):
            (self.folder / f"{split}.json").write_text(json.dumps(getattr(self, split)))

    def words(self, *more: str) -> list[str]:
        """`data check` with its memory in the test's folder."""
        words = ["data", "check", str(self.recipe), "--root", str(self.folder)]
        return [*words, "--state", str(self.folder / "state.sqlite"), *more]

    def report(self) -> list[dict[str, Any]]:
        """The lines of the last report."""
        lines = (self.folder / "state.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(name="data")
def checked_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence:
    """A sequence whose check remembers nothing of other tests."""
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))
    return Sequence(tmp_path)
