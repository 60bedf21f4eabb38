"""The CMML layout: all tasks and splits in one array, labels in several forms, answers that are generated."""

import json
from pathlib import Path
from typing import Any

import pytest

from delo_llava.data.cmml import label_form
from delo_llava.data.readers import read_records, stream_records
from delo_llava.errors import DeloError
from delo_llava.tasks import ClassTask, TaskSpec

GENRES = ["drama", "comedy", "war", "action"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


def item(
    task: int, label: Any, image: str = "pie/1.jpg", split: str = "train", text: Any = "t"
) -> dict[str, Any]:
    return {"task_id": task, "split": split, "image": image, "text": text, "label": label}


def spec(folder: Path, items: Any, number: int = 0, names: list[str] | None = None) -> TaskSpec:
    """Task `number` of a file with two classes for each task."""
    file = folder / "all.json"
    file.write_text(json.dumps(items))
    if names is not None:
        (folder / "classes.json").write_text(json.dumps(names))
    classes = ClassTask(number, 2, "Which?", folder / "classes.json" if names is not None else None)
    files = {"train": file, "val": file, "test": file}
    return TaskSpec(f"task{number}", "k", files, folder / "images", classes=classes)  # type: ignore[arg-type]


def test_single_labels_named_by_folders_and_by_file_names(tmp_path: Path) -> None:
    items = [
        item(0, 0, "apple_pie/apple_pie_7.jpg", text=["bake it", "eat it"]),
        item(0, 1, "miso_soup_12.jpg", "test"),
        item(2, 1, "test/miso_soup_13.jpg", "val"),
        item(1, 2, "ramen/a.jpg", "test"),
        item(1, 0, "apple_pie/x.jpg", "test", text=""),
    ]
    [first] = read_records(spec(tmp_path, items), "train")
    assert (first.id, first.answer, first.context, first.instruction) == (
        "0-train-0",
        "apple pie",
        "bake it. eat it",
        "Which?",
    )
    assert first.image == tmp_path / "images" / "apple_pie" / "apple_pie_7.jpg"
    assert first.extra == {"labels": ["apple pie"], "label_ids": [0], "label_form": "index"}
    [second] = read_records(spec(tmp_path, items), "test")
    assert second.answer == "miso soup"
    assert second.extra["classes"] == ["apple pie", "miso soup"]
    later = read_records(spec(tmp_path, items, 1), "test")
    assert [(record.id, record.answer, record.context) for record in later] == [
        ("1-test-3", "ramen", "t"),
        ("1-test-4", "apple pie", None),
    ]
    assert later[0].extra["classes"] == ["apple pie", "miso soup", "ramen"]
    assert list(stream_records(spec(tmp_path, items, 1), "test")) == list(later)


def test_further_keys_are_kept_for_scorers(tmp_path: Path) -> None:
    [record] = read_records(spec(tmp_path, [item(0, 0) | {"calories": 300, "note": None}]), "train")
    assert record.extra == {"calories": 300, "labels": ["pie"], "label_ids": [0], "label_form": "index"}


@pytest.mark.parametrize(
    ("labels", "form"),
    [
        ([[0, 2], [1]], "indices"),
        ([[1, 0, 1, 0], [0, 1, 0, 0]], "vector"),
        ([["drama", "war"], ["comedy"]], "names"),
    ],
)
def test_several_labels_in_every_form(tmp_path: Path, labels: list[Any], form: str) -> None:
    found = list(read_records(spec(tmp_path, [item(1, label) for label in labels], 1, GENRES), "train"))
    assert [record.answer for record in found] == ["drama, war", "comedy"]
    assert [record.extra["label_ids"] for record in found] == [[0, 2], [1]]
    assert {record.extra["label_form"] for record in found} == {form}


def test_labels_of_later_tasks_are_left_out(tmp_path: Path) -> None:
    items = [item(0, [1, 1, 0, 1]), item(1, [1, 1, 0, 1])]
    assert [r.answer for r in read_records(spec(tmp_path, items, 0, GENRES), "train")] == ["comedy, drama"]
    assert [r.answer for r in read_records(spec(tmp_path, items, 1, GENRES), "train")] == [
        "action, comedy, drama"
    ]


def test_two_lists_of_equal_length_with_zero_and_one_are_a_vector_only_if_all_are(tmp_path: Path) -> None:
    spec(tmp_path, [item(0, [0, 1]), item(0, [0])])
    assert label_form(tmp_path / "all.json") == "indices"
    spec(tmp_path, [item(0, [0, 1]), item(0, [1, 1])])
    assert label_form(tmp_path / "all.json") == "vector"


@pytest.mark.parametrize(
    ("items", "names", "told"),
    [
        ([item(0, 0), item(0, [0])], None, "several forms"),
        ([item(0, None)], None, "not understood"),
        ([item(0, True)], None, "not understood"),
        ([item(0, [])], None, "not understood"),
        ([item(0, [0, 1, 0])], None, "need the names of their classes"),
        ([item(0, 0, "pie/1.jpg"), item(0, 0, "tart/1.jpg")], None, "class 0 has several names"),
        ([item(0, 0, "pie/1.jpg"), item(0, 2, "tart/1.jpg")], None, "do not tell one name"),
        ([item(0, 0, "pie/1.jpg"), item(0, 1, "pie/2.jpg")], None, "do not tell one name"),
        ([item(0, 4)], GENRES, "no such class index"),
        ([item(0, "dramma")], GENRES, "did you mean drama"),
        ([item(0, 0)], ["a", "a"], "list of different names"),
        ([item(0, [0, 0, 1, 0])], GENRES, "none of its labels belongs to its task"),
        ([item(0, 0, split="dev")], None, "no such split"),
        ([item(-1, 0)], None, "whole number from 0"),
        ([item(0, 0, text=[1])], None, "text or a list of texts"),
        ([item(0, 0, "../x.jpg")], GENRES, "outside the image folder"),
        ([{"task_id": 0, "split": "train", "label": 0}], GENRES, "lacks image, text"),
        ([item(1, 0)], GENRES, "has no item of this task_id and split"),
    ],
)
def test_faults_are_told(tmp_path: Path, items: list[Any], names: list[str] | None, told: str) -> None:
    with pytest.raises(DeloError, match=told):
        read_records(spec(tmp_path, items, 0, names), "train")
