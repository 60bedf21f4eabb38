"""Images on their way into a batch: unusable ones are named, every mode is read, the cache is bounded."""

from pathlib import Path

import pytest
import torch
from collate_support import BOTH, change, collator, science_record  # noqa: F401
from PIL import Image

from delo_llava.data import images
from delo_llava.data.images import EncodedImage, ImageCache, load_image
from delo_llava.errors import DeloError
from delo_llava.tasks import Record


def test_unusable_images_name_file_and_record(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record.image is not None
    whole = record.image.read_bytes()
    broken = {
        "cut.png": whole[: len(whole) // 2],
        "flipped.png": whole[:60] + bytes(b ^ 0xFF for b in whole[60:90]) + whole[90:],
        "text.png": b"not an image",
        "empty.png": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DeloError, match=rf"(?s)record 'r0' \(science/train\).*{name}"):
            collator()([(change(record, image=tmp_path / name), BOTH)])
    with pytest.raises(DeloError, match=r"(?s)'r0'.*there is no such file.*gone\.png"):
        collator()([(change(record, image=tmp_path / "gone.png"), BOTH)])
    monkeypatch.setattr(images, "MAX_PIXELS", 90 * 60 - 1)
    with pytest.raises(DeloError, match=r"(?s)'r0'.*90x60 is more than 5399 pixels"):
        collator()([(record, BOTH)])


def test_an_image_the_model_cannot_take_names_file_and_record(record: Record, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2)).save(tmp_path / "strip.png")
    with pytest.raises(DeloError, match=r"(?s)'r0'.*aspect ratio.*strip\.png"):
        collator("qwen2_5_vl")([(change(record, image=tmp_path / "strip.png"), BOTH)])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str, record: Record, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (20, 20)).save(path)
    assert load_image(path, record).mode == "RGB"
    collator()([(change(record, image=path), BOTH)])


def test_cache_is_bounded_and_forgets_the_oldest() -> None:
    made: list[str] = []

    def get(key: str) -> EncodedImage:
        return cache_of_two.get(key, lambda: made.append(key) or EncodedImage({"x": torch.zeros(25)}, (), 1))

    cache_of_two = ImageCache(max_bytes=200)
    for key in "abacab":
        get(key)
    assert "".join(made) == "abcb"
    assert cache_of_two.bytes == 200
    cache_of_two.get("large", lambda: EncodedImage({"x": torch.zeros(99)}, (), 1))
    assert cache_of_two.bytes <= 200


def test_cached_images_are_the_same_as_fresh_ones(record: Record) -> None:
    kept, fresh = collator(), collator(cache_bytes=0)
    item = (record, BOTH)
    for _ in range(2):
        assert torch.equal(kept([item]).inputs["pixel_values"], fresh([item]).inputs["pixel_values"])
