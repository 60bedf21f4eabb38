"""Side files joined to records: every shape and key, and every way in which they do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delo_llava.data.readers import read_records
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, SideFile, TaskSpec

QUESTIONS = [
    {"question_id": 11, "image": "a/COCO_val2014_000000000007.jpg", "text": "Q1", "answer": "A"},
    {"question_id": "12", "image": "b.v1.png", "text": "Q2", "answer": "A", "video": 5},
    {"question_id": 12, "text": "Q3", "answer": "A"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


def read(folder: Path, *sides: SideFile, entries: list[dict[str, Any]] = QUESTIONS) -> list[Record]:
    file = folder / "test.json"
    file.write_text(json.dumps(entries))
    return list(read_records(TaskSpec("t", "k", {"test": file}, folder / "images", sides=sides), "test"))


def side(folder: Path, content: Any, **more: Any) -> SideFile:
    path = folder / f"side{len(list(folder.glob('side*')))}.json"
    path.write_text(json.dumps(content))
    return SideFile("answers of people", path, **more)


def test_a_list_of_rows_by_id(tmp_path: Path) -> None:
    rows = {"data": [{"qid": 11, "answers": [{"answer": "x"}, {"answer": "y"}], "deep": {"er": 1.5}}]}
    extra = {"answers": "answers[].answer", "er": "deep.er", "lacks": "no.such", "row": "."}
    joined = side(tmp_path, rows, at="data", key=("qid",), extra=extra)
    first, second, _ = read(tmp_path, joined)
    assert first.extra == {"answers": ["x", "y"], "er": 1.5, "lacks": None, "row": rows["data"][0]}
    assert second.extra == {"video": 5}


def test_repeated_ids_and_turns_share_the_row(tmp_path: Path) -> None:
    joined = side(tmp_path, {"12": {"n": 1}}, shape="map", extra={"n": "n"})
    found = read(tmp_path, joined)
    assert [(record.id, record.extra.get("n")) for record in found] == [("11", None), ("12", 1), ("12~2", 1)]
    talk = [{"from": role, "value": "V"} for role in ("human", "gpt") * 2]
    turns = read(tmp_path, joined, entries=[{"id": 12, "conversations": talk}])
    assert [(record.id, record.extra["n"]) for record in turns] == [("12#0", 1), ("12#1", 1)]


@pytest.mark.parametrize(
    ("by", "key", "place"),
    [
        ("image", "a/COCO_val2014_000000000007.jpg", 0),
        ("image_name", "COCO_val2014_000000000007.jpg", 0),
        ("image_stem", "b.v1", 1),
        ("image_number", "7", 0),
        ("number", "3", 2),
        ("video", "5", 1),
    ],
)
def test_what_a_record_is_joined_by(tmp_path: Path, by: str, key: str, place: int) -> None:
    found = read(tmp_path, side(tmp_path, [{"k": key}], key=("k",), by=by, extra={"hit": "k"}))
    assert [number for number, record in enumerate(found) if "hit" in record.extra] == [place]


def test_keys_alone_and_a_place_inside(tmp_path: Path) -> None:
    found = read(
        tmp_path, side(tmp_path, {"test": ["11"], "val": ["12"]}, shape="keys", at="test", extra={"in": "."})
    )
    assert [record.extra.get("in") for record in found] == [True, None, None]


def test_rows_of_one_key_are_gathered(tmp_path: Path) -> None:
    rows = [{"i": 7, "caption": "one cat "}, {"i": 7, "caption": "a cat"}, {"i": 8, "caption": "a dog"}]
    more = {"key": ("i",), "by": "image_number", "gather": True, "context": "caption", "prefix": "Captions: "}
    first, second, _ = read(tmp_path, side(tmp_path, rows, **more, extra={"captions": "caption"}))
    assert first.context == "Captions: one cat a cat"
    assert first.extra["captions"] == ["one cat ", "a cat"]
    assert second.context is None


def test_contexts_are_added_unless_the_instruction_says_them(tmp_path: Path) -> None:
    entries = [
        {"question_id": 1, "text": "Context: it is cold\nQ", "answer": "A"},
        {"question_id": 2, "text": "Q", "answer": "A", "context": "own"},
        {"question_id": 3, "text": "Q", "answer": "A"},
    ]
    rows = {"1": {"hint": "it is cold"}, "2": {"hint": "it is warm"}, "3": {"hint": ""}}
    hint = side(tmp_path, rows, shape="map", context="hint")
    tokens = side(tmp_path, {"2": {"words": ["a", "b"]}}, shape="map", context="words", prefix="OCR: ")
    found = read(tmp_path, hint, tokens, entries=entries)
    assert [record.context for record in found] == [None, "own\nit is warm\nOCR: a b", None]


def test_a_side_file_for_other_splits_is_not_read(tmp_path: Path) -> None:
    broken = replace(side(tmp_path, []), path=tmp_path / "none.json", splits=("train",))
    assert len(read(tmp_path, broken)) == 3


def test_a_changed_side_file_is_read_anew(tmp_path: Path) -> None:
    joined = side(tmp_path, {"11": {"n": 1}}, shape="map", extra={"n": "n"})
    assert read(tmp_path, joined)[0].extra["n"] == 1
    joined.path.write_text(json.dumps({"11": {"n": 22}}))
    assert read(tmp_path, joined)[0].extra["n"] == 22


@pytest.mark.parametrize(
    ("content", "more", "told"),
    [
        (
            [{"k": 99}],
            {"key": ("k",), "extra": {"n": "k"}},
            "No record has a row in the side file 'answers of people'",
        ),
        ([{"k": 99}], {"key": ("qid",), "extra": {"n": "k"}}, "row 0 lacks its key"),
        (["x"], {"key": ("qid",), "extra": {"n": "k"}}, "row 0 lacks its key"),
        ([], {"key": ("k",), "extra": {"n": "k"}}, "at least one entry"),
        ({"data": []}, {"at": "rows", "key": ("k",), "extra": {"n": "k"}}, "at least one entry"),
        ({"a": 1}, {"key": ("k",), "extra": {"n": "k"}}, "should hold a JSON array"),
        ([1], {"shape": "map", "extra": {"n": "k"}}, "should hold a JSON object"),
    ],
)
def test_files_that_do_not_fit_are_told(
    tmp_path: Path, content: Any, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(DeloError, match=told):
        read(tmp_path, side(tmp_path, content, **more))
