"""Reading CoIN's two JSON formats, with every fault told by file and entry."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from delo_llava.data import readers
from delo_llava.data.missing import MissingSpec, effective, record_presence
from delo_llava.data.readers import read_records, stream_records
from delo_llava.errors import DeloError
from delo_llava.tasks import TaskSpec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Arrow cache of this test's own."""
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def task(folder: Path, entries: Any, split: str = "train") -> TaskSpec:
    """A task with one file; `entries` is written as JSON unless it is text already."""
    file = folder / f"{split}.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return TaskSpec("t", "test", {split: file}, folder / "images")  # type: ignore[dict-item]


def talk(*turns: str, **more: Any) -> dict[str, Any]:
    """A training entry with alternating turns."""
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)], **more}


GOOD = talk("<image>\nWhat?", "Yes", id="a", image="x.png")


def test_training_entry(tmp_path: Path) -> None:
    [record] = read_records(task(tmp_path, [GOOD | {"context": " a caption "}]), "train")
    assert (record.id, record.task, record.split) == ("a", "t", "train")
    assert (record.instruction, record.answer, record.context) == ("What?", "Yes", "a caption")
    assert record.image == tmp_path / "images" / "x.png"


def test_placeholder_at_the_end_and_inner_line_breaks(tmp_path: Path) -> None:
    [record] = read_records(
        task(tmp_path, [talk("Q?\nOne word.\n<image>", "A", id=1, image="x.png")]), "train"
    )
    assert record.instruction == "Q?\nOne word."


def test_test_entries(tmp_path: Path) -> None:
    entries = [
        {"question_id": 7, "image": "a/b.jpg", "text": "Q?\nOne word.", "answer": "red", "category": "x"},
        {"question_id": "8", "text": "Q?", "answer": 4, "context": ""},
    ]
    first, second = read_records(task(tmp_path, entries, "test"), "test")
    assert (first.id, first.answer, first.context) == ("7", "red", None)
    assert (second.id, second.answer, second.image, second.context) == ("8", "4", None, None)


def test_every_turn_pair_is_a_record(tmp_path: Path) -> None:
    entries = [talk("<image>\nQ1", "A1", "Q2", "A2", "Q3", "A3", id="c", image="x.png", context="k"), GOOD]
    records = read_records(task(tmp_path, entries), "train")
    assert [r.id for r in records] == ["c#0", "c#1", "c#2", "a"]
    assert [(r.instruction, r.answer) for r in records][:3] == [("Q1", "A1"), ("Q2", "A2"), ("Q3", "A3")]
    assert {r.image for r in records} == {tmp_path / "images" / "x.png"}
    assert [r.context for r in records] == ["k", "k", "k", None]
    assert (len(records), records.conversations) == (4, 2)


def test_repeated_and_absent_ids_become_unique(tmp_path: Path) -> None:
    entries = [GOOD, GOOD, GOOD | {"id": "a~2"}, talk("Q", "A"), GOOD]
    ids = [r.id for r in read_records(task(tmp_path, entries), "train")]
    assert ids == ["a", "a~2", "a~2~2", "3", "a~3"]
    assert len(set(ids)) == 5


def test_mixed_types_of_ids_and_absent_fields_share_a_file(tmp_path: Path) -> None:
    entries = [
        talk("Q", "A", id=1),
        talk("Q", "A", id="two", context="c"),
        talk("<image>Q", "A", image="i.png"),
    ]
    assert [r.id for r in read_records(task(tmp_path, entries), "train")] == ["1", "two", "2"]


def test_slices_and_selection(tmp_path: Path) -> None:
    records = read_records(task(tmp_path, [talk(f"Q{i}", "A", id=i) for i in range(9)]), "train")
    assert [r.instruction for r in records[2:5]] == ["Q2", "Q3", "Q4"]
    assert records[-1].id == "8"
    assert [r.id for r in records.select([5, 1])] == ["5", "1"]
    assert [r.id for r in records] == records.ids


def test_sub_is_exact_nested_ordered_and_seeded(tmp_path: Path) -> None:
    spec = task(tmp_path, [talk(f"Q{i}", "A", id=i) for i in range(50)])
    small, large = (read_records(spec, "train", sub=sub, seed=1).ids for sub in (0.2, 0.6))
    assert (len(small), len(large)) == (10, 30)
    assert set(small) < set(large)
    assert small == sorted(small, key=int)
    assert read_records(spec, "train", sub=0.2, seed=2).ids != small
    assert len(read_records(spec, "train", sub=0.001)) == 1
    assert len(read_records(spec, "train", sub=0.58)) == 29  # 0.58 * 50 is 28.999…
    again = read_records(spec, "train", sub=0.2, seed=1)
    assert [record.id for record in again] == [again[i].id for i in range(len(again))] == small


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (talk("Q", "", id="z"), r"entry 1 \(id z\): there is no answer"),
        (talk("Q", "  ", id="z"), "there is no answer"),
        ({"question_id": "z", "text": "Q"}, "there is no answer"),
        ({"question_id": "z", "text": "Q", "answer": []}, "there is no answer"),
        ({"question_id": "z", "text": "Q", "answer": [1]}, "there is no answer"),
        ({"question_id": "z", "text": "Q", "answer": True}, "there is no answer"),
        (
            {"question_id": "z", "answer": "A"},
            "(?s)no question under one of the keys conversations, .*question_id, answer",
        ),
        (talk("<image>\n", "A", id="z", image="x.png"), "instruction is empty"),
        (talk("<image>\nQ", "A", id="z"), "names no image"),
        (talk("Q", id="z"), "must alternate"),
        (talk("Q", "A", "Q2", id="z"), "must alternate"),
        (
            {"id": "z", "conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]},
            "alternate",
        ),
        ({"id": "z", "conversations": []}, "list of turns"),
        ({"id": "z", "conversations": "Q"}, "list of turns"),
        (GOOD | {"image": "../x.png"}, "outside the image folder"),
        (GOOD | {"image": "/etc/passwd"}, "outside the image folder"),
        (GOOD | {"image": "a/../../x.png"}, "outside the image folder"),
        (GOOD | {"image": ["x.png", "y.png"]}, "must be one path"),
        (GOOD | {"context": ["a", "b"]}, "`context` must be text"),
        ("text", "it is not an object"),
    ],
)
def test_faults_name_file_and_entry(tmp_path: Path, entry: Any, told: str) -> None:
    with pytest.raises(DeloError, match=told) as caught:
        read_records(task(tmp_path, [GOOD, entry]), "train")
    assert str(tmp_path / "train.json") in str(caught.value)
    assert "entry 1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[{", "not valid JSON"),
        ("{}", "should hold a JSON array"),
        ("", "not valid JSON"),
        ('[{"text": "Q", "answer": "A"}', "not valid JSON"),
        ("[]", "at least one entry"),
        ('{"a": 1}\n{"a": 2}', "must be called .jsonl"),
    ],
)
def test_files_that_are_no_array_are_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DeloError, match=told):
        read_records(task(tmp_path, text), "train")


def test_an_image_inside_the_root_may_be_written_with_dots_or_absolute(tmp_path: Path) -> None:
    inside = str(tmp_path / "images" / "y.png")
    entries = [GOOD | {"image": "a/../x.png"}, GOOD | {"image": inside}]
    found = [r.image for r in read_records(task(tmp_path, entries), "train")]
    assert found == [tmp_path / "images" / "x.png", tmp_path / "images" / "y.png"]


def test_a_split_the_task_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="has no val file"):
        read_records(task(tmp_path, [GOOD]), "val")


def test_rows_are_memory_mapped_and_a_changed_file_is_read_anew(tmp_path: Path, cache: Path) -> None:
    spec = task(tmp_path, [GOOD])
    first = read_records(spec, "train")
    assert first.path.is_relative_to(cache)
    assert first.dataset.cache_files[0]["filename"] == str(first.path), "rows live in a file, not in memory"
    assert first.dataset[0]["instruction"] == "What?"
    spec.files["train"].write_text(json.dumps([talk("New?", "No", id="b")]))
    os.utime(spec.files["train"], ns=(1, 1))
    assert [r.instruction for r in read_records(spec, "train")] == ["New?"]


def test_a_second_read_uses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = task(tmp_path, [GOOD])
    read_records(spec, "train")
    monkeypatch.setattr(readers, "_write", lambda *_: pytest.fail("the JSON file was read again"))
    assert read_records(spec, "train").ids == ["a"]


def test_several_answers_and_boxes(tmp_path: Path) -> None:
    entries = [
        {"question_id": 1, "text": "Q", "answer": ["red", "dark red"]},
        {"question_id": 2, "text": "Q", "answer_bbox": "[0.10, 0.20, 0.30, 0.40]", "size": [640, 480]},
        {"question_id": 3, "text": "Q", "answer_bbox": [0.1, 0.2, 0.3, 1.0], "size": [640, 480]},
        {"question_id": 4, "text": "Q", "answer": 1.50},
    ]
    several, written, numbers, point = read_records(task(tmp_path, entries, "test"), "test")
    assert (several.answer, several.extra) == ("red", {"answers": ["red", "dark red"]})
    assert written.answer == "[0.10, 0.20, 0.30, 0.40]"
    assert written.extra == {"answer_bbox": "[0.10, 0.20, 0.30, 0.40]", "size": [640, 480]}
    assert numbers.answer == "[0.1, 0.2, 0.3, 1.0]"
    assert numbers.extra["answer_bbox"] == [0.1, 0.2, 0.3, 1.0]
    assert point.answer == "1.5"


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | {'id': 'b'})}\n")
    spec = TaskSpec("t", "test", {"train": file}, tmp_path / "images")
    assert [record.id for record in read_records(spec, "train")] == ["a", "b"]
    file.write_text(f"{json.dumps(GOOD)}\n{{broken\n")
    with pytest.raises(DeloError, match="line 2"):
        read_records(spec, "train")


def parquet(folder: Path, rows: list[dict[str, Any]]) -> TaskSpec:
    file = folder / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return TaskSpec("t", "test", {"test": file}, folder / "images")


def picture(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def test_parquet_with_paths_and_with_embedded_pictures(tmp_path: Path, cache: Path) -> None:
    rows = [
        {"question_id": 1, "text": "<image>Q", "answer": "A", "image": {"bytes": None, "path": "x.png"}},
        {"question_id": 2, "text": "Q", "answer": "A", "image": {"bytes": picture("red"), "path": "../../x"}},
        {"question_id": 3, "text": "Q", "answer": "A", "image": {"bytes": picture("red"), "path": None}},
        {"question_id": 4, "text": "Q", "answer": "A", "image": None},
    ]
    named, red, again, none = read_records(parquet(tmp_path, rows), "test")
    assert named.image == tmp_path / "images" / "x.png"
    assert red.image == again.image, "the same picture is written once"
    assert red.image is not None and red.image.is_relative_to(cache), "the name in the data decides nothing"
    with Image.open(red.image) as opened:
        assert opened.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert none.image is None


def test_embedded_bytes_that_are_no_picture_are_told(tmp_path: Path) -> None:
    rows = [{"question_id": 7, "text": "Q", "answer": "A", "image": {"bytes": b"#!/bin/sh", "path": "x.png"}}]
    with pytest.raises(DeloError, match=r"entry 0 \(id 7\): the embedded image cannot be read"):
        read_records(parquet(tmp_path, rows), "test")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DeloError, match="not valid parquet"):
        read_records(parquet_of(tmp_path), "test")


def parquet_of(folder: Path) -> TaskSpec:
    return TaskSpec("t", "test", {"test": folder / "test.parquet"}, folder / "images")


def test_a_stream_gives_the_same_records_and_stores_nothing(tmp_path: Path, cache: Path) -> None:
    spec = task(tmp_path, [GOOD, talk("Q1", "A1", "Q2", "A2", id="b"), GOOD])
    streamed = list(stream_records(spec, "train"))
    assert not cache.exists()
    assert streamed == list(read_records(spec, "train"))
    spec.files["train"].write_text(json.dumps([GOOD, "broken"]))
    found = stream_records(spec, "train")
    assert next(found).id == "a"
    with pytest.raises(DeloError, match=r"entry 1 \(id 1\): it is not an object"):
        next(found)


def test_columns_equal_what_records_say(tmp_path: Path) -> None:
    entries = [
        GOOD,
        talk("Quelle ?", "é", id="b", context="c d"),
        talk("Q1", "A1", "Q2", "A2", image="y.png"),
    ]
    records = read_records(task(tmp_path, entries), "train")
    chosen = records.select([3, 0, 1])
    for these in (records, chosen):
        assert these.natural.tolist() == [[r.image is not None, r.context is not None] for r in these]
        lengths = [[len(r.instruction) + len(r.answer), len(r.context or "")] for r in these]
        assert these.characters.tolist() == lengths
        assert these.ids == [r.id for r in these]
        assert list(these.dataset["id"]) == list(these.ids)
        spec = MissingSpec(ratio=0.5, seed=3)
        assert (record_presence(spec, these) == record_presence(spec, list(these))).all()
        assert effective(spec, these) == effective(spec, list(these))
    assert (records.conversations, chosen.conversations) == (3, 3)
    assert records.ids[1:].__getitem__(0) == "b"
    with pytest.raises(IndexError):
        records.select([4])


def test_a_failed_first_read_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DeloError):
        read_records(task(tmp_path, [GOOD, "broken"]), "train")
    assert not list(cache.rglob("*.arrow"))
    assert not list(cache.rglob(".rows-*"))


MEASURE = """
import json, resource, sys
from pathlib import Path
from delo_llava.data.readers import read_records
from delo_llava.tasks import TaskSpec
for name in sys.argv[1:]:
    path = Path(name)
    records = read_records(TaskSpec("t", "k", {"train": path}, path.parent / "images"), "train")
    print(len(records), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file six times as large takes hardly more: 226 MB were measured at 153 MB of peak memory in all."""
    entry = json.dumps(talk(*(["what color is the thing on the left side? " * 2, "red"] * 13), id="a"))
    for name, entries in (("small", 700), ("large", 4200)):
        (tmp_path / f"{name}.json").write_text("[" + ",".join([entry] * entries) + "]")
    files = [str(tmp_path / f"{name}.json") for name in ("small", "large")]
    assert Path(files[1]).stat().st_size > 7e6
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True)
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (small, large) == (700 * 13, 4200 * 13)
    assert (after - before) * 1024 < 7e6
