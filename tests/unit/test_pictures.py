"""Pictures before the first step: their sizes by their headers, and what prompts lose to them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import training_support as support
from PIL import Image

from delo_llava.backbones.base import find_backbone
from delo_llava.config import load_config
from delo_llava.data import images
from delo_llava.data.images import BadImage, decode, size_by_header
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.preflight import Preflight
from delo_llava.training import pictures
from delo_llava.training.fit import Kit
from delo_llava.training.pictures import Pictures

ORIENTATION = 0x0112


def kit(kind: str) -> Kit:
    backbone, path = find_backbone(str(tiny_models.session(kind)))
    return Kit(backbone, backbone.load_processor(path))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "jpeg.png"])
@pytest.mark.parametrize("turn", [None, 1, 3, 6, 8])
def test_the_header_tells_the_size_that_is_decoded(
    name: str, turn: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where EXIF lays the picture on its side; no pixel is decoded for it."""
    picture, exif = Image.new("RGB", (31, 17), "navy"), Image.Exif()
    if turn is not None:
        exif[ORIENTATION] = turn
    options: dict[str, Any] = {} if turn is None or name in ("a.gif", "a.bmp") else {"exif": exif}
    picture.save(tmp_path / name, format="JPEG" if name == "jpeg.png" else None, **options)
    expected = decode(tmp_path / name).size
    if options and turn in (6, 8):
        assert expected == (17, 31)
    monkeypatch.setattr(images, "as_seen", lambda _: pytest.fail("pixels were decoded"))
    if name != "a.tif":  # of which Pillow turns an opened one by itself
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("pixels were decoded"))
    assert size_by_header(tmp_path / name) == expected


def test_the_first_frame_counts(tmp_path: Path) -> None:
    first, second = Image.new("P", (20, 10)), Image.new("P", (20, 10), 3)
    first.save(tmp_path / "two.gif", save_all=True, append_images=[second])
    assert size_by_header(tmp_path / "two.gif") == decode(tmp_path / "two.gif").size == (20, 10)


@pytest.mark.parametrize("content", [b"no picture", b"", b"\x89PNG\r\n\x1a\n"])
def test_a_file_without_a_header_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImage):
        size_by_header(tmp_path / "a.png")
    with pytest.raises(BadImage, match="no such file"):
        size_by_header(tmp_path / "b.png")


def test_no_file_is_opened_where_all_pictures_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (900, 30)).save(tmp_path / "wide.png")
    monkeypatch.setattr(pictures, "size_by_header", lambda path: pytest.fail("a header was read"))
    looked = Pictures(kit("llava"), 512)
    looked.look([str(tmp_path / "wide.png"), str(tmp_path / "none.png")])
    assert looked.layout(str(tmp_path / "wide.png")) == looked.dummy
    assert looked.unusable == {str(tmp_path / "none.png"): "there is no such file"}


def test_a_picture_becomes_what_it_becomes_in_training(tmp_path: Path) -> None:
    tiny, sizes = kit("qwen2_vl"), ((28, 28), (140, 56), (84, 84), (56, 140), (2000, 900))
    looked, paths = Pictures(tiny, 512), [tmp_path / f"{n}.png" for n in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    looked.look(list(map(str, paths)))
    found = [looked.layout(str(path)) for path in paths]
    assert found == [tiny.backbone.encode_image(tiny.processor, decode(path)).layout for path in paths]
    assert len(set(found)) > 2, "of unequal sizes"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    support.write_sequence(tmp_path, tasks=2, records=12)
    for name in ("red", "blue", "green"):  # of 4 image tokens, as the smallest of the tiny Qwen2-VL
        Image.new("RGB", (56, 56), name).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def look(place: Path, *more: str, kind: str = "qwen2_vl") -> list[str]:
    model = tiny_models.session(kind)
    words = support.words(place / "tiny.yaml", model, place / "run", "--missing.ratio=0", *more)
    job = make_job(load_config(None, words))
    backbone, path = find_backbone(job.config.model)
    limits = job.config.data.limits
    return Preflight(job, Kit(backbone, backbone.load_processor(path, limits))).run(job.plans, True)


def change(file: Path, row: int, **entries: Any) -> None:
    rows = json.loads(file.read_text())
    rows[row] |= entries
    file.write_text(json.dumps(rows))


#: Pictures of up to 256 tokens.
LARGE = "--data.max_pixels=200704"


def test_prompts_are_tried_with_each_picture_s_own_size(place: Path) -> None:
    """The dummy would become 144 tokens: more than these pictures, and fewer than the large one."""
    Image.new("RGB", (448, 448)).save(place / "images" / "large.png")
    assert look(place, LARGE, "--data.max_length=200") == []
    for row in (1, 4, 7):
        change(place / "task1_train.json", row, image="images/large.png")
    change(place / "task0_test.json", 0, image="images/large.png", context="a b c d e " * 30)
    assert look(place, LARGE, "--data.max_length=312") == [
        "task1/train: contexts cut to data.max_length: 3 of 12",
        "task0/test: contexts cut to data.max_length: 1 of 4",
    ]


def test_a_picture_that_fills_the_prompt_is_told_before_the_first_step(place: Path) -> None:
    Image.new("RGB", (448, 448)).save(place / "images" / "large.png")
    change(place / "task1_train.json", 5, image="images/large.png")
    with pytest.raises(DeloError, match=r"it becomes 256 tokens, and data\.max_length is 200") as error:
        look(place, LARGE, "--data.max_length=200")
    assert "task1_train.json (task1/train, id train-5)" in error.value.message
    notes = look(place, LARGE, "--data.max_length=200", "--data.on_bad_image=skip")
    assert notes == ["task1: training records whose pictures cannot be used: 1; they are left out"]


def test_the_dummy_of_a_picture_that_is_not_shown_takes_its_room(place: Path) -> None:
    hidden = ("--missing.ratio=1", "--missing.kind=image", "--eval.last_patterns=run", "--data.max_length=50")
    assert look(place, *hidden, kind="llava") == []
    notes = look(place, *hidden, "--missing.image=dummy", kind="llava")
    assert [note.partition(":")[0] for note in notes] == [
        "task0/train", "task1/train", "task0/test", "task1/test",
    ]  # fmt: skip
