"""Pictures as a person sees them: every way to store one gives the pixels that are computed by hand."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import Sequence
from PIL import Image

from delo_llava import cli
from delo_llava.backbones.base import find_backbone
from delo_llava.data.collate import Collator
from delo_llava.data.images import UnusableImage, load_image
from delo_llava.data.missing import MissingSpec
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.data_tools.decode import judge
from delo_llava.data_tools.prompts import Prompts
from delo_llava.data_tools.shown import shown
from delo_llava.tasks import Record

RECORD = Record("one", "task", "train", None, None, "what is it", "a cat")
WHITE = (255, 255, 255)


def seen(path: Path) -> Any:
    """The pixels of a file, by row."""
    return np.asarray(load_image(path, RECORD)).tolist()


def saved(folder: Path, name: str, picture: Image.Image, **options: Any) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def tiff(bits: int, data: bytes, form: int = 1, white_is_zero: bool = False, order: str = "<") -> bytes:
    """A grey TIFF of 4x1 pixels, uncompressed.

    Args:
        form: SampleFormat; 1 unsigned, 2 signed, 3 floating point.
    """
    data += b"\0" * (len(data) % 2)
    tags = [(256, 4), (257, 1), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data)), (339, form)]
    rows = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + rows + struct.pack(f"{order}I", 0)


def grey(*values: int) -> list[list[list[int]]]:
    return [[[value] * 3 for value in values]]


def on_white(colour: tuple[int, int, int], alpha: int) -> list[int]:
    """Alpha composition: each part rounded to the nearest."""
    return [int((value * alpha + 255 * (255 - alpha)) / 255 + 0.5) for value in colour]


def row(mode: str, *pixels: Any) -> Image.Image:
    """A picture of one row."""
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    """A picture that shows each colour of its palette once."""
    picture = row("P", *range(len(colours)))
    picture.putpalette([value for colour in colours for value in colour])
    return picture


RED, HALF = (200, 10, 0), (0, 0, 60)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_eight_bits_stay_as_they_are(tmp_path: Path, suffix: str) -> None:
    assert seen(saved(tmp_path, f"a.{suffix}", row("RGB", RED, HALF))) == [[list(RED), list(HALF)]]
    assert seen(saved(tmp_path, f"b.{suffix}", row("L", 0, 7, 255))) == grey(0, 7, 255)
    assert seen(saved(tmp_path, f"c.{suffix}", row("1", 0, 255))) == grey(0, 255)
    assert seen(saved(tmp_path, f"d.{suffix}", palette(RED, HALF))) == [[list(RED), list(HALF)]]


def test_few_bits_fill_the_range(tmp_path: Path) -> None:
    (tmp_path / "2.tif").write_bytes(tiff(2, bytes([0b00011011])))
    assert seen(tmp_path / "2.tif") == grey(0, 85, 170, 255)
    (tmp_path / "4.tif").write_bytes(tiff(4, bytes([0x08, 0xF1])))
    assert seen(tmp_path / "4.tif") == grey(0, 136, 255, 17)


DEEP = (0, 255, 256, 65535)


@pytest.mark.parametrize(
    ("bits", "data", "options", "expected"),
    [
        (16, struct.pack("<4H", *DEEP), {}, (0, 0, 1, 255)),
        (16, struct.pack(">4H", *DEEP), {"order": ">"}, (0, 0, 1, 255)),
        (16, struct.pack("<4H", *DEEP), {"white_is_zero": True}, (255, 255, 254, 0)),
        (12, bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF]), {}, (0, 1, 128, 255)),  # 0, 16, 2048, 4095
        (32, struct.pack("<4f", 0, 0.5, 0.2, 1), {"form": 3}, (0, 128, 51, 255)),
        (8, bytes([0, 1, 200, 255]), {"white_is_zero": True}, (255, 254, 55, 0)),
    ],
    ids=["16", "16 big-endian", "16 white is zero", "12", "floating point", "8 white is zero"],
)
def test_more_bits_are_scaled_and_not_clipped(
    tmp_path: Path, bits: int, data: bytes, options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(bits, data, **options))
    assert seen(tmp_path / "x.tif") == grey(*expected)


def test_sixteen_bits_of_grey_and_of_colour_agree(tmp_path: Path) -> None:
    """Grey by our rule, colours by Pillow's: what eight bits became by either usual way comes back."""
    for factor in (256, 257):
        ramp = (np.arange(256, dtype=np.uint16) * factor)[None]
        assert seen(saved(tmp_path, "grey.png", Image.fromarray(ramp))) == grey(*range(256))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0x00FF, 0x0100)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    body = head + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    (tmp_path / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert seen(tmp_path / "rgb.png") == [[[0x12, 0x56, 0x9A], [0xFF, 0x00, 0x01]]]


ALPHAS = (0, 1, 128, 255)


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("tif", {}), ("webp", {"lossless": True, "exact": True})]
)
def test_what_is_transparent_lies_on_white(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    black = row("RGBA", *((0, 0, 0, alpha) for alpha in ALPHAS))
    assert seen(saved(tmp_path, f"a.{suffix}", black, **options)) == grey(255, 254, 127, 0)
    coloured = row("RGBA", *((*RED, alpha) for alpha in ALPHAS))
    found = seen(saved(tmp_path, f"b.{suffix}", coloured, **options))
    assert found == [[on_white(RED, alpha) for alpha in ALPHAS]]
    assert found[0][0] == [*WHITE] and found[0][3] == [*RED]
    if suffix != "webp":
        assert seen(saved(tmp_path, f"c.{suffix}", row("LA", (0, 0), (0, 128), (9, 255)))) == grey(
            255, 127, 9
        )


def test_transparent_colours_and_entries_of_a_palette_lie_on_white(tmp_path: Path) -> None:
    two = palette(RED, HALF)
    assert seen(saved(tmp_path, "one.png", two, transparency=0)) == [[[*WHITE], [*HALF]]]
    several = [[on_white(RED, 128), on_white(HALF, 0)]]
    assert seen(saved(tmp_path, "several.png", two, transparency=bytes([128, 0]))) == several
    assert seen(saved(tmp_path, "two.gif", two, transparency=1)) == [[[*RED], [*WHITE]]]
    assert seen(saved(tmp_path, "rgb.png", row("RGB", RED, HALF), transparency=RED)) == [[[*WHITE], [*HALF]]]
    assert seen(saved(tmp_path, "grey.png", row("L", 7, 8), transparency=7)) == grey(255, 8)


def test_printing_colours(tmp_path: Path) -> None:
    """Red, green and blue are what cyan, magenta and yellow leave, darkened by black."""
    cmyk = row("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), (51, 0, 0, 127))
    expected = [[255, 0, 0], [0, 0, 0], [255, 255, 255], [102, 128, 128]]
    assert seen(saved(tmp_path, "x.tif", cmyk)) == [expected]


#: Orientation -> the pixels of `1 2 3 / 4 5 6` upright (EXIF 2.32: where row 0 and column 0 of the file are).
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],  # row 0 top, column 0 right
    3: [[6, 5, 4], [3, 2, 1]],  # bottom, right
    4: [[4, 5, 6], [1, 2, 3]],  # bottom, left
    5: [[1, 4], [2, 5], [3, 6]],  # row 0 is the left side, column 0 the top
    6: [[4, 1], [5, 2], [6, 3]],  # right, top
    7: [[6, 3], [5, 2], [4, 1]],  # right, bottom
    8: [[3, 6], [2, 5], [1, 4]],  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("webp", {"lossless": True}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})],
)
def test_pictures_are_turned_upright(
    tmp_path: Path, orientation: int, suffix: str, options: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("L", (3, 2))
    picture.putdata(range(1, 7))
    path = saved(tmp_path, f"x.{suffix}", picture.convert("RGB"), exif=exif, **options)
    assert [[pixel[0] for pixel in line] for line in seen(path)] == UPRIGHT[orientation]


def test_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        path = saved(tmp_path, f"x.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
        assert seen(path) == [[[255, 0, 0]] * 6] * 4


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, "x.webp", row("RGB", RED, HALF), lossless=True, exif=b"no exif at all")
    assert seen(path) == [[[*RED], [*HALF]]]


def keyed(folder: Path) -> Path:
    """A 16-bit PNG with a transparent colour, which is written with 16 bits."""
    return saved(folder, "x.png", Image.fromarray(np.array([[300, 400]], dtype=np.uint16)), transparency=300)


def written(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "x.tif").write_bytes(content)
        return folder / "x.tif"

    return write


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (written(tiff(16, struct.pack("<4h", -5, 0, 300, 32767), form=2)), "signed"),
        (written(tiff(8, bytes([0, 1, 200, 255]), form=2)), "signed"),
        (written(tiff(32, struct.pack("<4I", 0, 1, 2**31, 2**32 - 1))), "32-bit"),
        (written(tiff(32, struct.pack("<4f", 0, 0.5, 1, 1.5), form=3)), "beyond 0 to 1"),
        (written(tiff(32, struct.pack("<4f", 0, float("nan"), 1, 1), form=3)), "beyond 0 to 1"),
        (keyed, "transparent colour"),
    ],
    ids=[
        "signed 16",
        "signed 8",
        "unsigned 32",
        "large floating point",
        "no number",
        "deep transparent colour",
    ],
)
def test_what_cannot_be_shown_faithfully_is_refused_by_file_and_record(
    tmp_path: Path, make: Callable[[Path], Path], told: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UnusableImage, match=rf"(?s)'one' \(task/train\).*{told}.*{path.name}"):
        load_image(path, RECORD)
    verdict = judge(str(path))
    assert (verdict.code, verdict.width) == ("image_undecodable", 0)
    assert told in verdict.reason


def test_training_check_and_show_see_the_same_picture(tmp_path: Path) -> None:
    """A turned drawing on transparent ground, through each of the three."""
    data = Sequence(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 40, 5))
    drawing.save(data.images / "0.png", exif=exif)
    upright = Image.new("RGB", (20, 40), "white")
    upright.paste((0, 0, 0), (15, 0, 20, 40))
    [task] = load_sequence(str(data.recipe), data.folder).tasks
    record = read_records(task, "train")[0]
    [item] = shown(task, read_records(task, "train"), [0], MissingSpec(), Prompts("mini-llava", 512))
    assert item.picture is not None and item.picture.tobytes() == upright.tobytes()
    backbone, path = find_backbone("mini-llava")
    processor = backbone.load_processor(path)
    batch = Collator(backbone, processor, 512)([(record, (True, True))])
    expected = backbone.encode_image(processor, upright).inputs
    assert (batch.inputs["pixel_values"] == expected["pixel_values"]).all()
    verdict = judge(str(record.image))
    assert (verdict.width, verdict.height) == upright.size


def test_nearly_black_pictures_are_a_note(tmp_path: Path) -> None:
    """Twelve bits in sixteen are scaled by the range of sixteen, and so look black."""
    data = Sequence(tmp_path)
    ct = np.arange(48, dtype=np.uint16).reshape(6, 8) * 80
    Image.fromarray(ct).save(data.images / "3.png")
    assert cli.main(data.words("--no-tokens")) == 0
    _, note, _ = data.report()  # the summary before it; turns that stand apart in the data as it is behind it
    assert (note["kind"], note["code"], note["record"]) == ("note", "image_dark", "a3")
    assert "14 of 255" in note["message"]


@pytest.mark.parametrize(
    ("given", "there", "told"),
    [
        ("P1.PNG", "p1.png", "but p1.png is there"),
        ("a%20b.png", "a b.png", "but a b.png is there"),
        ("cafe\u0301.png", "caf\u00e9.png", "is there, whose letters are composed otherwise"),
        ("sub\\x.png", "sub/x.png", "but .*/sub/x.png is there"),
        ("sub\\y.png", "sub/x.png", "folders are parted by /"),
        ("other.png", "x.png", "no such file$"),
    ],
)
def test_a_missing_file_is_told_with_what_is_there(tmp_path: Path, given: str, there: str, told: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    saved(tmp_path, there, row("L", 1))
    with pytest.raises(UnusableImage) as caught:
        load_image(tmp_path / given, RECORD)
    verdict = judge(str(tmp_path / given))
    assert verdict.code == "image_missing"
    for message in (caught.value.message, verdict.reason):
        assert re.search(told, message)
