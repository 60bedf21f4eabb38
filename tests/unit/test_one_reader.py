"""One reader: byte order marks, capitals, parquet's columns and embedded pictures are the same everywhere."""

import datetime
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_support import Sequence
from PIL import Image

from delo_llava import cli
from delo_llava.data.images import UnusableImage, load_image
from delo_llava.data.readers import open_reading, read_records, stream_records
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, TaskSpec

BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Sequence:
    return Sequence(tmp_path)


def faults(data: Sequence) -> list[tuple[str, str, Any]]:
    """(code, split, entry) of what the last check found."""
    lines = data.report()[1:]
    return [(line["code"], line["split"], line["entry"]) for line in lines if line["kind"] == "fault"]


def rename(data: Sequence, **files: str) -> None:
    """Let the recipe name other files."""
    recipe = json.loads(data.recipe.read_text())
    recipe["tasks"][0]["files"] |= files
    data.recipe.write_text(json.dumps(recipe))


def png(colour: Any, size: tuple[int, int] = (8, 6), form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, form, **options)
    return out.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_byte_order_marks_and_capitals_change_nothing(data: Sequence) -> None:
    assert cli.main(data.words()) == 0
    changing = {"sha256": "", "file": "", "found": ""}
    before = [part | changing for part in data.report()[0]["parts"]]
    (data.folder / "train.json").write_bytes(BOM + (data.folder / "train.json").read_bytes())
    lines = "".join(json.dumps(entry) + "\r\n" for entry in data.test)
    (data.folder / "TEST.JSONL").write_bytes(BOM + lines.encode())
    rename(data, test="TEST.JSONL")
    data.recipe.write_bytes(BOM + data.recipe.read_bytes())
    for picture in data.images.iterdir():
        picture.rename(picture.with_suffix(".PNG"))
    for file in ("train.json", "TEST.JSONL"):
        path = data.folder / file
        path.write_bytes(path.read_bytes().replace(b".png", b".PNG"))
    assert cli.main(data.words()) == 0
    assert [part | changing for part in data.report()[0]["parts"]] == before
    assert [line["code"] for line in data.report()[1:]] == ["annotations_changed", "turns_apart"]


def test_numbers_are_written_alike_in_every_form(tmp_path: Path) -> None:
    rows = ('"answer": 0.10, "size": 1.50', '"answer": 1e3', '"answer": 7')
    text = "".join(f'{{"text": "q", {row}}}\n' for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.json").write_text("[" + ",".join(text.splitlines()) + "]")
    found = [
        [
            (record.answer, dict(record.extra))
            for record in read_records(TaskSpec("t", "k", {"train": file}, tmp_path), "train")
        ]
        for file in (tmp_path / "a.json", tmp_path / "a.jsonl")
    ]
    assert found[0] == found[1] == [("0.10", {"size": 1.5}), ("1E+3", {}), ("7", {})]


def test_columns_that_json_cannot_hold_are_written_out(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 1, 2, 3, 4, 5)
    row = {
        "text": "q",
        "answer": "a",
        "made": when,
        "day": when.date(),
        "took": datetime.timedelta(seconds=90),
    }
    write_parquet(tmp_path / "a.parquet", [row | {"thumb": b"xyz", "views": [{"bytes": b"1", "path": None}]}])
    [record] = read_records(TaskSpec("t", "k", {"train": tmp_path / "a.parquet"}, tmp_path), "train")
    one = hashlib.sha256(b"1").hexdigest()
    assert record.extra == {
        "made": "2024-01-02T03:04:05",
        "day": "2024-01-02",
        "took": 90.0,
        "thumb": f"3 bytes, sha256 {hashlib.sha256(b'xyz').hexdigest()}",
        "views": [{"bytes": f"1 bytes, sha256 {one}", "path": None}],
    }


def test_a_number_that_is_none_is_told_with_its_key(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "q", "answer": "a", "fine": 1.5, "score": float("nan")}])
    with pytest.raises(DeloError, match=r"entry 0 \(id 0\): a number is not finite or too large, in score\."):
        read_records(TaskSpec("t", "k", {"train": tmp_path / "a.parquet"}, tmp_path), "train")


def test_embedded_pictures_are_checked_like_files(data: Sequence) -> None:
    """Cut off, the same as a test's picture, or no picture at all; training says the same of each."""
    whole, same = png((1, 2, 3), (40, 40)), (data.images / "12.png").read_bytes()
    rows = [
        {
            "id": f"e{number}",
            "text": f"what is {number}?",
            "answer": "it",
            "image": {"bytes": content, "path": "x"},
        }
        for number, content in enumerate((whole, whole[:-30], same, png("red", form="MPO", save_all=True)))
    ]
    write_parquet(data.folder / "train.parquet", rows)
    rename(data, train="train.parquet")
    assert cli.main(data.words()) == 1
    assert faults(data) == [("overlap_content", "test", 0), ("image_undecodable", "train", 1)]
    records = read_records(
        TaskSpec("one", "k", {"train": data.folder / "train.parquet"}, data.images), "train"
    )
    assert [record.image is not None and record.image.suffix for record in records] == [".png"] * 3 + [".jpg"]
    assert load_image(records[0].image, records[0]).size == (40, 40)  # type: ignore[arg-type]
    with pytest.raises(UnusableImage, match=r"record 'e1' \(one/train\)"):
        load_image(records[1].image, records[1])  # type: ignore[arg-type]
    write_parquet(
        data.folder / "train.parquet",
        [rows[0], {**rows[0], "id": "e9", "image": {"bytes": b"GIF?", "path": "x"}}],
    )
    assert cli.main(data.words()) == 1
    assert faults(data) == [("image_undecodable", "train", 1)]


SPOILT: list[Any] = [
    5, None, [], {}, {"id": []}, {"text": "q"}, {"text": "q", "answer": "a", "image": 5},
    {"text": "q", "answer": "a", "context": {}}, {"conversations": [1]}, {"text": "<image>", "answer": ""},
    {"text": "q", "answer": {}, "image": "../x"}, {"messages": []}, {"text": 7, "answer": 7},
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(SPOILT)))
def test_strict_and_tolerant_reading_agree(tmp_path: Path, place: int) -> None:
    """Training stops where the check finds the first fault, and the rows around it are the same."""
    good = [{"id": f"g{i}", "text": "q", "answer": "a"} for i in range(3)]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([*good[:2], SPOILT[place], good[2]]))
    task = TaskSpec("t", "k", {"train": file}, tmp_path)
    entries = list(open_reading(task, "train", lambda error: pytest.fail(str(error))))
    assert [len(entry.rows) for entry in entries if entry.number != 2] == [1, 1, 1]
    assert [bool(entry.faults) for entry in entries] == [False, False, True, False]
    stream = stream_records(task, "train")
    first: list[Record] = [next(stream), next(stream)]
    with pytest.raises(DeloError) as caught:
        next(stream)
    assert entries[2].faults[0].message in caught.value.message
    assert [record.id for record in first] == [entry.rows[0]["id"] for entry in entries[:2]]
    with pytest.raises(DeloError, match="entry 2"):
        read_records(task, "train")


def test_a_broken_side_file_does_not_hide_the_entries(data: Sequence) -> None:
    recipe = json.loads(data.recipe.read_text())
    side = {"name": "hints", "file": "hints.json", "shape": "map", "by": "id", "context": "."}
    recipe["tasks"][0]["sides"] = [{**side, "splits": ["train"]}]
    data.recipe.write_text(json.dumps(recipe))
    (data.folder / "hints.json").write_text('{"a1": "think", ')
    data.train[2]["image"] = "gone.png"
    data.write()
    assert cli.main(data.words("--no-tokens")) == 1
    assert faults(data) == [("file_unreadable", "train", None), ("image_missing", "train", 2)]
    assert data.report()[0]["parts"][0]["records"] == 15


def test_an_image_without_captions_is_told_by_record(data: Sequence) -> None:
    recipe = json.loads(data.recipe.read_text())
    side = {
        "name": "captions",
        "file": "caps.json",
        "shape": "list",
        "key": "id",
        "gather": True,
        "splits": ["test"],
    }
    recipe["tasks"][0] |= {"scorer": "caption_plain", "sides": [{**side, "extra": {"captions": "caption"}}]}
    data.recipe.write_text(json.dumps(recipe))
    captions = [{"id": f"q{i}", "caption": "a picture"} for i in range(12, 18) if i != 14]
    (data.folder / "caps.json").write_text(json.dumps(captions))
    assert cli.main(data.words("--no-tokens")) == 1
    assert faults(data) == [("extra_missing", "test", 2)]
    [fault] = [line for line in data.report() if line.get("code") == "extra_missing"]
    assert fault["record"] == "q14" and "`captions` or `answers`" in fault["message"]
