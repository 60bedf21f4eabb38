"""Prepared data: the same draw every time, what readers take, nothing overwritten, killed runs go on."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_support import Sequence, picture

from delo_llava import cli
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.data_tools import prepare_cmml
from delo_llava.data_tools.prepared import Preparation


def prepare(what: str, source: Path, target: Path, *more: str) -> int:
    return cli.main(["data", "prepare", what, *more, "--from", str(source), "--to", str(target)])


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def food(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five classes, of which four are taken, two a task; one picture has no text."""
    monkeypatch.setattr(prepare_cmml, "FOOD_CLASSES", 4)
    monkeypatch.setattr(prepare_cmml, "FOOD_PER_TASK", 2)
    raw, number = tmp_path / "food", 0
    (raw / "texts").mkdir(parents=True)
    for split, count in (("train", 10), ("test", 3)):
        rows = []
        for name in ("apple_pie", "ramen", "sushi", "tacos", "waffles"):
            for image in [f"{name}_{i}.jpg" for i in range(count)]:
                number += 1
                picture(raw / "images" / split / name / image, number)
                rows.append([image, f'how to make "{name}", {number}', name])
        with (raw / "texts" / f"{split}_titles.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows[1:])
    return raw


def test_food101_is_drawn_reproducibly(
    food: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("food101_cmml", food, tmp_path / "a") == 0
    assert "RebQ's authors publish" in capsys.readouterr().out
    assert prepare("food101_cmml", food, tmp_path / "b") == 0
    assert prepare("food101_cmml", food, tmp_path / "c", "--seed", "5") == 0
    place = "UPMC-Food101-CMML/UPMC-Food101-CMML.json"
    one, two, other = ((tmp_path / name / place).read_text() for name in "abc")
    assert one == two != other
    items = json.loads(one)
    parts = [(item["task_id"], item["split"]) for item in items]
    sizes = {part: parts.count(part) for part in parts}
    assert sizes == {(t, s): n for t in (0, 1) for s, n in (("train", 18), ("val", 2), ("test", 6))}
    names = {item["label"]: Path(item["image"]).parent.name for item in items}
    assert sorted(names) == [0, 1, 2, 3]
    assert all(item["label"] // 2 == item["task_id"] for item in items)
    assert all(names[item["label"]] in item["text"] for item in items if item["text"])
    assert all((tmp_path / "a/UPMC-Food101-CMML/images" / item["image"]).is_file() for item in items)
    manifest = load(tmp_path / "a" / "prepared.json")
    assert (manifest["complete"], len(manifest["sources"]), len(manifest["files"])) == (True, 4, 1)
    assert manifest["counts"]["items"] == 52
    assert manifest["counts"]["without_text"] == sum(not item["text"] for item in items)
    picture(food / "images" / "train" / "ramen" / "ramen_99.jpg", 999)
    with pytest.raises(SystemExit, match="2"):
        prepare("food101_cmml", food, tmp_path / "a")


def test_titles_of_any_length_and_with_a_byte_order_mark(food: Path, tmp_path: Path) -> None:
    file = food / "texts" / "train_titles.csv"
    rows = list(csv.reader(file.read_text().splitlines()))
    rows[3][1] = "long " * 40_000
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out).writerows(rows)
    limit = csv.field_size_limit()
    assert prepare("food101_cmml", food, tmp_path / "a") == 0
    assert csv.field_size_limit() == limit, "it holds for the whole process"
    items = load(tmp_path / "a/UPMC-Food101-CMML/UPMC-Food101-CMML.json")
    texts = {Path(item["image"]).name: item["text"] for item in items if item["split"] != "test"}
    assert texts[rows[0][0]] == rows[0][1]
    assert texts[rows[3][0]] == rows[3][1].strip()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b'ramen"", 1', b'ramen" 1', "(?s)cannot be read: ',' expected after.*after line"),
        (b"how to", b"cr\xe8me", "(?s)cannot be read: .*utf-8.*train_titles.csv"),
        (b",", b";", "(?s)Most rows of this file are not: image, text, class.*line 1: "),
        (b".jpg", b"_small.jpg", "(?s)Most images have no text.*of 52"),
        (b'",ramen', b",ramen", "(?s)cannot be read: .*train_titles.csv, after line"),
    ],
    ids=["quote inside", "Latin-1", "semicolons", "other names", "open quote"],
)
def test_titles_that_cannot_be_understood_are_refused(
    food: Path, tmp_path: Path, old: bytes, new: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        file = food / "texts" / f"{split}_titles.csv"
        file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(SystemExit, match="2"):
        prepare("food101_cmml", food, tmp_path / "a")
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "a" / "UPMC-Food101-CMML" / "UPMC-Food101-CMML.json").exists()


def test_rows_that_hold_no_image_are_noted(food: Path, tmp_path: Path) -> None:
    file = food / "texts" / "train_titles.csv"
    file.write_text("image,title,class\n" + file.read_text())
    assert prepare("food101_cmml", food, tmp_path / "a") == 0
    assert "1 of 50 rows hold no image, first line 1" in load(tmp_path / "a" / "prepared.json")["notes"][0]


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty films with genres a-d and the rare z; one without a poster."""
    monkeypatch.setattr(prepare_cmml, "GENRES", 4)
    monkeypatch.setattr(prepare_cmml, "GENRES_PER_TASK", 2)
    raw = tmp_path / "films"
    (raw / "dataset").mkdir(parents=True)
    for number in range(30):
        genres = ["abcd"[number % 4], "abcd"[number // 4 % 4]] if number else ["z"]
        film = {"plot": [f"plot {number}", "more"], "genres": sorted(set(genres)), "title": "t"}
        (raw / "dataset" / f"{number:07}.json").write_text(json.dumps(film))
        if number != 7:
            picture(raw / "dataset" / f"{number:07}.jpeg", number)
    names = [f"{number:07}" for number in range(30)]
    split = {"train": names[:20], "dev": names[20:23], "test": names[23:]}
    (raw / "split.json").write_text(json.dumps(split))
    return raw


def test_mm_imdb_has_one_task_for_each_film_and_vectors(films: Path, tmp_path: Path) -> None:
    assert prepare("mm_imdb_cmml", films, tmp_path / "a") == 0
    root = tmp_path / "a" / "MM-IMDB-CMML"
    items, genres = load(root / "MM-IMDB-CMML.json"), load(root / "classes.json")
    assert sorted(genres) == ["a", "b", "c", "d"]
    assert len(items) == len({item["image"] for item in items}) == 28
    for item in items:
        film = load(films / "dataset" / f"{Path(item['image']).stem}.json")
        assert [genres[i] for i, flag in enumerate(item["label"]) if flag] == sorted(
            film["genres"], key=genres.index
        )
        assert any(item["label"][2 * item["task_id"] : 2 * item["task_id"] + 2])
        assert item["text"] == film["plot"]
        assert (root / "images" / item["image"]).is_file()
    assert {item["split"] for item in items} == {"train", "val", "test"}
    (films / "split.json").unlink()
    assert prepare("mm_imdb_cmml", films, tmp_path / "b") == 0
    assert "were drawn" in load(tmp_path / "b" / "prepared.json")["notes"][0]


def test_done_before_is_told_and_nothing_is_overwritten(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a"
    assert prepare("mm_imdb_cmml", films, target) == 0
    file = target / "MM-IMDB-CMML" / "MM-IMDB-CMML.json"
    before = file.stat().st_mtime_ns
    assert prepare("mm_imdb_cmml", films, target) == 0
    assert "done before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        prepare("mm_imdb_cmml", films, target, "--seed", "9")
    assert "is there already" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    assert prepare("mm_imdb_cmml", films, target, "--seed", "9", "--force") == 0
    assert file.stat().st_mtime_ns != before


def test_a_killed_preparation_goes_on(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Preparation, path: Path, entries: Any) -> int:
        self._claim(path)
        path.write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Preparation, "write_entries", killed)
        prepare("mm_imdb_cmml", films, tmp_path / "a")
    assert load(tmp_path / "a" / "prepared.json")["complete"] is False
    assert prepare("mm_imdb_cmml", films, tmp_path / "a") == 0
    assert len(load(tmp_path / "a" / "MM-IMDB-CMML" / "MM-IMDB-CMML.json")) == 28


COCO = {
    "images": [{"id": 9}],
    "annotations": [
        {"image_id": 9, "caption": "a cat. "},
        {"image_id": 5, "caption": "a dog."},
        {"image_id": 9, "caption": "on a mat."},
    ],
}
OCR = {"data": [{"image_id": "f0a", "ocr_tokens": ["STOP", "NOW"]}, {"image_id": "x", "ocr_tokens": []}]}
HINTS = {"12": {"hint": " think ", "question": "?"}, "13": {"hint": ""}}
RECORDS = [
    {"id": "12", "image": "train2014/COCO_train2014_000000000009.jpg", "text": "Q", "context": "own"},
    {"id": "13", "image": "train_images/f0a.jpg", "text": "Q"},
    {"id": "14", "text": "Q"},
]


@pytest.mark.parametrize(
    ("kind", "content", "texts", "contexts"),
    [
        ("coco", COCO, {"9": "a cat. on a mat.", "5": "a dog."}, ["own\na cat. on a mat.", None, None]),
        ("ocr", OCR, {"f0a": "STOP NOW"}, ["own", "STOP NOW", None]),
        ("hints", HINTS, {"12": "think"}, ["own\nthink", None, None]),
        ("map", {"f0a.jpg": "a sign", "14": "b"}, {"f0a.jpg": "a sign", "14": "b"}, ["own", "a sign", "b"]),
    ],
)
def test_texts_become_a_side_file_or_the_context(
    tmp_path: Path, kind: str, content: Any, texts: dict[str, str], contexts: list[str | None]
) -> None:
    side, records = tmp_path / "side.json", tmp_path / "records.json"
    side.write_text(json.dumps(content))
    records.write_text(json.dumps(RECORDS))
    assert prepare("side", side, tmp_path / "out.json", "--kind", kind) == 0
    assert load(tmp_path / "out.json") == texts
    joined = tmp_path / "joined.json"
    assert prepare("join", records, joined, "--side", str(side), "--kind", kind) == 0
    entries = load(joined)
    assert [entry.get("context") for entry in entries] == contexts
    assert [{**entry, "context": 0} for entry in entries] == [{**entry, "context": 0} for entry in RECORDS]
    counts = load(tmp_path / "joined.json.prepared.json")["counts"]
    assert counts["keys_used"] + counts["keys_unused"] == len(texts)
    assert counts["entries_without_text"] == sum(
        one == other.get("context") for one, other in zip(contexts, RECORDS, strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "content", "told"),
    [
        ("coco", OCR, "is not of the kind 'coco'"),
        ("coco", {"annotations": [{"image_id": "a", "caption": "b"}]}, "is not of the kind 'coco'"),
        ("ocr", {"data": [{"image_id": "nowhere", "ocr_tokens": ["A"]}]}, "No entry has a text"),
        ("hints", [1], "of the kind 'hints'"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    tmp_path: Path, kind: str, content: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "side.json").write_text(json.dumps(content))
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    with pytest.raises(SystemExit, match="2"):
        words = ("--side", str(tmp_path / "side.json"), "--kind", kind)
        prepare("join", tmp_path / "records.json", tmp_path / "out.json", *words)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_sub_sample_is_what_a_run_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    data = Sequence(source)
    data.train[3]["id"] = "a2"
    data.write()
    target = tmp_path / "target"
    words = (str(data.recipe), "--sub", "0.5", "--seed", "3")
    assert cli.main(["data", "prepare", "sub", *words, "--from", str(source), "--to", str(target)]) == 0
    [task] = load_sequence(str(data.recipe), source).tasks
    [made] = load_sequence(str(data.recipe), target).tasks
    wanted = read_records(task, "train", 0.5, 3)
    found = read_records(made, "train")
    assert [*found.ids] == [*wanted.ids]
    assert any("#" in name for name in found.ids)
    for one, other in zip(found, wanted, strict=True):
        assert (one.instruction, one.answer, one.context) == (other.instruction, other.answer, other.context)
        assert (one.image is None) == (other.image is None)
        assert one.image is None or other.image is None or one.image.samefile(other.image)
    assert (target / "test.json").is_symlink()
    assert (target / "images").is_symlink()
    assert load(target / "prepared.json")["counts"] == {"one": 7}


def test_links_under_the_other_known_name(tmp_path: Path) -> None:
    for task, names in (
        ("A", ["val.json"]),
        ("B", ["test.json", "train.json"]),
        ("C", ["val.json", "test.json"]),
    ):
        for name in names:
            (tmp_path / "in" / task).mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / task / name).write_text(f'["{task}/{name}"]')
    assert prepare("links", tmp_path / "in", tmp_path / "out") == 0
    assert load(tmp_path / "out/A/test.json") == ["A/val.json"]
    assert load(tmp_path / "out/B/val.json") == ["B/test.json"]
    assert load(tmp_path / "out/B/train.json") == ["B/train.json"]
    assert load(tmp_path / "out/C/val.json") == ["C/val.json"]
    assert prepare("links", tmp_path / "in", tmp_path / "in") == 0
    assert (tmp_path / "in/A/test.json").is_symlink()
    assert not (tmp_path / "in/A/val.json").is_symlink()
    assert prepare("links", tmp_path / "in", tmp_path / "in") == 0


def test_nothing_to_prepare_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("food101_cmml", "mm_imdb_cmml", "links"):
        with pytest.raises(SystemExit, match="2"):
            prepare(what, tmp_path / "none", tmp_path / "out")
        (tmp_path / what).mkdir()
        with pytest.raises(SystemExit, match="2"):
            prepare(what, tmp_path / what, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "nothing to prepare from" in capsys.readouterr().err
