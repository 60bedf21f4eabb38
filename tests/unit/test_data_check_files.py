"""The data check on whole files: broken ones, the CMML layout, lines, side files, links to other disks."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_support import Sequence, checked_data, picture  # noqa: F401

from delo_llava import cli
from delo_llava.data.entries import each_entry
from delo_llava.data.faults import BadEntry
from delo_llava.data.images import BadImage, decode
from delo_llava.data.readers import open_reading
from delo_llava.errors import DeloError
from delo_llava.tasks import ClassTask, TaskSpec


def notes(data: Sequence) -> list[dict[str, Any]]:
    """The notes of the last report, but that turns stand apart, as they do in the data as it is."""
    lines = [line for line in data.report() if line["kind"] == "note"]
    return [line for line in lines if line["code"] != "turns_apart"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"id": 1}', "not valid JSON"),
        ('{"a": 1}', "should hold a JSON array"),
        ("[]", "at least one entry"),
        ("", "not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        ('[{"question_id": "\udce9"}]', "cannot be read|not valid JSON"),
    ],
)
def test_a_broken_file_is_told(data: Sequence, content: str, told: str) -> None:
    (data.folder / "test.json").write_bytes(content.encode(errors="surrogateescape"))
    assert cli.main(data.words("--no-tokens")) == 1
    [fault] = [line for line in data.report() if line.get("code") == "file_unreadable"]
    assert any(part in fault["message"] for part in told.split("|"))


def test_a_picture_that_was_not_fetched_is_told(data: Sequence) -> None:
    """By the check, which has its bytes, and by training, which has its path."""
    file = data.images / "2.png"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert cli.main(data.words("--no-tokens")) == 1
    [fault] = [line for line in data.report() if line["kind"] == "fault"]
    assert fault["record"] == "a2" and "pointer of Git LFS" in fault["message"]
    with pytest.raises(BadImage, match="git lfs pull"):
        decode(file)


def test_entries_before_a_break_are_checked(data: Sequence) -> None:
    data.train[1]["image"] = "../x"
    data.write()
    file = data.folder / "train.json"
    file.write_text(file.read_text()[:-30])
    assert cli.main(data.words()) == 1
    codes = [line["code"] for line in data.report() if line["kind"] == "fault"]
    assert sorted(codes) == ["file_unreadable", "image_outside"]


def test_items_of_the_cmml_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file for all tasks and splits: every item is told whose it is, and what is wrong with it."""
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))
    good = {"task_id": 0, "split": "train", "image": "pie/a.jpg", "text": ["one", "two"], "label": 0}
    bad = [{**good, "label": label} for label in (None, [], -1, True, [0, -1], "", {"a": 1})]
    lost = [{**good, "task_id": "0"}, {**good, "split": "dev"}]
    other = [{**good, "task_id": 1}, {**good, "split": "test"}]
    file = tmp_path / "cmml.json"
    file.write_text(json.dumps([good, *other, *lost, *bad, {**good, "image": "../pie/x.jpg", "text": 5}]))
    files: dict[Any, Path] = dict.fromkeys(("train", "val", "test"), file)
    spec = TaskSpec("task1", "naming", files, tmp_path, classes=ClassTask(0, 1, "Which?"))
    told: list[DeloError] = []
    found = list(open_reading(spec, "train", told.append))
    assert not told
    assert [entry.part for entry in found] == ["0/train", "1/train", "0/test", None, None] + ["0/train"] * 8
    assert [entry.number for entry in found if entry.rows] == [0, 1, 2]
    assert (found[0].rows[0]["context"], found[0].rows[0]["answer"]) == ("one. two", "pie")
    codes = [[fault.code for fault in entry.faults] for entry in found[3:]]
    assert codes == [["entry_malformed"]] * 2 + [["label_form"]] * 7 + [["image_outside", "entry_malformed"]]


def test_labels_of_several_forms_are_told_once_and_the_items_are_checked(data: Sequence) -> None:
    """The check of a whole recipe in this layout: one reading serves all tasks and splits."""
    item = {"split": "train", "image": "1.png", "text": "t"}
    items = [{**item, "task_id": 0, "label": 1}, {**item, "task_id": 1, "label": [1], "image": "/x"}]
    items += [{**item, "task_id": 0, "split": "test", "label": 0, "image": "2.png"}]
    (data.folder / "all.json").write_text(json.dumps(items))
    classes = {"per_task": 1, "instruction": "Which?"}
    files = {"train": "all.json", "test": "all.json"}
    tasks = [
        {
            "name": f"t{n}",
            "kind": "k",
            "files": files,
            "image_root": "images",
            "classes": classes | {"number": n},
        }
        for n in (0, 1)
    ]
    data.recipe.write_text(json.dumps({"name": "mine", "tasks": tasks}))
    assert cli.main(data.words("--no-tokens")) == 1
    summary, *faults = data.report()
    assert [(fault["code"], fault["task"], fault["entry"]) for fault in faults] == [
        ("file_unreadable", "t0", None),
        ("image_outside", "t1", 1),
    ]
    assert "several forms" in faults[0]["message"]
    assert [part["entries"] for part in summary["parts"]] == [1, 1, 1, 0]
    assert summary["images_decoded"] == 2


def test_bad_lines_of_jsonl_are_told_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": 1}\n{"id": \n\n{"id": 3}\n')
    one, two, three = each_entry(file)
    assert (one, three) == ({"id": 1}, {"id": 3})
    assert isinstance(two, BadEntry)
    assert "line 2" in two.message


def test_entries_without_a_row_in_a_side_file_are_counted(data: Sequence) -> None:
    recipe = json.loads(data.recipe.read_text())
    side = {"name": "hints", "file": "hints.json", "shape": "map", "by": "id", "context": "."}
    recipe["tasks"][0]["sides"] = [{**side, "splits": ["train"]}]
    data.recipe.write_text(json.dumps(recipe))
    (data.folder / "hints.json").write_text(json.dumps({"a1": "think", "m8": "look"}))
    assert cli.main(data.words("--no-tokens")) == 0
    [note] = notes(data)
    assert (note["code"], note["message"][:26]) == ("side_unmatched", "10 of 12 entries have no r")


def test_links_out_of_the_folder_pass_and_are_told_once(data: Sequence, tmp_path: Path) -> None:
    away = tmp_path / "away"
    for number in (0, 1, 2):
        picture(away / f"{number}.png", 100 + number)
        (data.images / f"{number}.png").unlink()
        (data.images / f"{number}.png").symlink_to(away / f"{number}.png")
    assert cli.main(data.words()) == 0
    [note] = notes(data)
    assert (note["code"], note["record"]) == ("link_outside", "a0")
    assert note["message"].startswith(f"3 images in {data.images} lie in {away}")


def test_a_linked_folder_is_one_note_however_many_folders_it_has(data: Sequence, tmp_path: Path) -> None:
    for number in (0, 1):
        picture(tmp_path / "away" / f"sub{number}" / "x.png", 200 + number)
        data.train[number]["image"] = f"disk/sub{number}/x.png"
    (data.images / "disk").symlink_to(tmp_path / "away")
    data.write()
    assert cli.main(data.words("--no-tokens")) == 0
    [note] = notes(data)
    assert note["message"].startswith(f"2 images in {data.images / 'disk'} lie in {tmp_path / 'away'}, ")


def test_the_image_folder_itself_may_be_a_link(data: Sequence, tmp_path: Path) -> None:
    data.images.rename(tmp_path / "disk")
    data.images.symlink_to(tmp_path / "disk")
    assert cli.main(data.words()) == 0
    assert notes(data) == []
