"""Reading CoIN's two JSON formats, with every fault told by file and entry."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from delo_llava.data import readers
from delo_llava.data.readers import read_records
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
        ({"question_id": "z", "answer": "A"}, "instruction must be text"),
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
        ("text", "is not an object"),
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
