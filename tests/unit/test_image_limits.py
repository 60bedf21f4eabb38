"""How large a picture is shown: `data.min_pixels`, `data.max_pixels`, `data.max_tiles`."""

from pathlib import Path

import pytest
import tiny_models
from PIL import Image

from delo_llava.backbones.base import Backbone, find_backbone
from delo_llava.config import load_config
from delo_llava.data.collate import Collator
from delo_llava.data.images import ImageLimits, UnusableImage
from delo_llava.errors import DeloError
from delo_llava.tasks import Record


def tokens(kind: str, size: tuple[int, int], **limits: int) -> int:
    """Image tokens of a picture of some size."""
    backbone, path = find_backbone(tiny_models.session(kind))
    parts = backbone.load_processor(path, ImageLimits(**limits))
    layout = backbone.encode_image(parts, Image.new("RGB", size)).layout
    return sum(copies for text, copies in layout if text == backbone.image_token)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pixels_bound_a_picture_of_any_size(kind: str) -> None:
    backbone, path = find_backbone(tiny_models.session(kind))
    processor = backbone.load_processor(path).image_processor
    side = processor.patch_size * processor.merge_size  # of what becomes one token
    large, small = (16 * side, 16 * side), (2 * side, 2 * side)
    assert tokens(kind, large, min_pixels=side**2, max_pixels=64 * side**2) == 64
    assert tokens(kind, large, min_pixels=side**2, max_pixels=256 * side**2) == 256
    assert tokens(kind, small, min_pixels=16 * side**2, max_pixels=64 * side**2) == 16


def test_tiles_can_be_limited() -> None:
    wide = (64 * 4, 64)
    one, two = (tokens("internvl", wide, max_tiles=count) for count in (1, 2))
    assert two > one


@pytest.mark.parametrize(
    ("kind", "limit"), [("llava", "max_pixels"), ("qwen2_5_vl", "max_tiles"), ("llava_next", "max_tiles")]
)
def test_a_limit_that_a_family_does_not_have_is_refused(kind: str, limit: str) -> None:
    backbone: Backbone = find_backbone(tiny_models.session(kind))[0]
    with pytest.raises(DeloError, match="no such limit") as caught:
        backbone.limit_options(ImageLimits(**{limit: 4}))
    assert f"--data.{limit}=4" in str(caught.value)


def test_bounds_are_in_order() -> None:
    assert load_config(None, ["--data.min_pixels=4", "--data.max_pixels=9"]).data.limits.given() == {
        "min_pixels": 4, "max_pixels": 9,
    }  # fmt: skip
    with pytest.raises(DeloError, match="min_pixels 9 is above max_pixels 4"):
        load_config(None, ["--data.min_pixels=9", "--data.max_pixels=4"])


def test_a_picture_that_takes_all_the_room_may_be_left_out(tmp_path: Path) -> None:
    """The remedy that is offered works in a run that has begun: its length stays what it was."""
    backbone, path = find_backbone(tiny_models.session("qwen2_5_vl"))
    parts = backbone.load_processor(path, ImageLimits(min_pixels=28**2, max_pixels=400 * 28**2))
    records = []
    for name, side in (("large", 560), ("small", 56)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
        records.append(Record(name, "t", "train", tmp_path / f"{name}.png", None, "what?", "red"))
    items = [(record, (True, False)) for record in records]
    with pytest.raises(
        UnusableImage, match=r"(?s)'large'.*becomes \d+ tokens.*data\.max_length is 128"
    ) as error:
        Collator(backbone, parts, 128)(items)
    assert error.value.fix is not None and "--data.on_bad_image=skip" in error.value.fix
    passing = Collator(backbone, parts, 128, skip_bad_images=True)
    assert passing(items).record_ids == ["small"] and list(passing.bad_images) == ["t/large"]
