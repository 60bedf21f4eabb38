"""Work grows with the data, whatever the data: equal ids, one image for everything, one key for all rows."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from delo_llava.data.readers import open_reading, read_records
from delo_llava.data_tools.decode import Verdict
from delo_llava.data_tools.memory import Memory
from delo_llava.tasks import SideFile, TaskSpec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


def task(folder: Path, entries: list[Any], *sides: SideFile) -> TaskSpec:
    file = folder / "train.json"
    file.write_text(json.dumps(entries))
    return TaskSpec("t", "k", {"train": file}, folder / "images", sides=sides)


class Counted(dict[str, int]):
    """A dictionary that counts how often it is asked."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return super().__contains__(key)


@pytest.mark.parametrize("names", [["same"], ["same", "same~2", "same~3"], ["a", "b"]])
def test_equal_ids_are_numbered_in_one_pass(tmp_path: Path, names: list[str]) -> None:
    count = 3000
    entries = [{"id": names[i % len(names)], "text": str(i), "answer": "a"} for i in range(count)]
    reading = open_reading(task(tmp_path, entries), "train")
    reading._taken = Counted()
    found = [row["id"] for row in reading.rows()]
    assert len(set(found)) == count
    assert count <= reading._taken.asked <= 3 * count
    assert found[:2] == ["same", "same~2"] if names[0] == "same" else ["a", "b"]


def test_the_number_behind_an_id_is_the_first_that_is_free(tmp_path: Path) -> None:
    names = ["a", "a~2", "a", "a", "a~2", "a~3", "a"]
    entries = [{"id": name, "text": "q", "answer": "a"} for name in names]
    ids = list(read_records(task(tmp_path, entries), "train").ids)
    assert ids == ["a", "a~2", "a~3", "a~4", "a~2~2", "a~3~2", "a~5"]


def test_null_is_no_id(tmp_path: Path) -> None:
    entries = [
        {"id": None, "text": "q", "answer": "a"},
        {"id": None, "question_id": 9, "text": "q", "answer": "a"},
    ]
    side = tmp_path / "side.json"
    side.write_text('{"9": "hint", "None": "wrong"}')
    joined = SideFile("hints", side, shape="map", context=".")
    records = read_records(task(tmp_path, entries, joined), "train")
    assert [(record.id, record.context) for record in records] == [("0", None), ("9", "hint")]


def test_rows_of_one_key_are_gathered_in_one_pass(tmp_path: Path) -> None:
    """Copying what was gathered so far for every row took some ten seconds here."""
    rows = [{"k": 0, "caption": f"caption {i}"} for i in range(60_000)]
    side = tmp_path / "side.json"
    side.write_text(json.dumps(rows))
    joined = SideFile("captions", side, key=("k",), gather=True, context="caption", extra={"all": "caption"})
    began = time.process_time()
    [record] = read_records(task(tmp_path, [{"id": 0, "text": "q", "answer": "a"}], joined), "train")
    assert time.process_time() - began < 4
    assert record.extra["all"] == [row["caption"] for row in rows]
    assert record.context == " ".join(record.extra["all"])


def overlap_steps(folder: Path, count: int) -> int:
    """Steps of SQLite for the overlap of `count` entries that all show one image, every other in the test."""
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    with Memory(folder / f"{count}.sqlite") as memory:
        for number in range(count):
            split = "train" if number % 2 else "test"
            memory.refer("/one.png", "t", split, f"{split}.json", number, f"r{number}")
        memory.judged([Verdict("/one.png", 1, 1, "a", 8, 8)])
        memory.index()
        memory._db.set_progress_handler(step, 100)
        memory.add_overlaps()
        memory._db.set_progress_handler(None, 0)
        faults = list(memory.faults())
    assert [fault.code for fault in faults] == ["overlap_path"] * (count // 2)
    assert all(fault.message == "/one.png is also shown by the training record r1" for fault in faults)
    return steps


def test_one_image_in_every_entry_is_compared_in_one_pass(tmp_path: Path) -> None:
    few, many = overlap_steps(tmp_path, 400), overlap_steps(tmp_path, 1600)
    assert many < 8 * few
