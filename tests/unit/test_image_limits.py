"""How large a picture is shown: `data.min_pixels`, `data.max_pixels`, `data.max_tiles`."""

import pytest
import tiny_models
from PIL import Image

from delo_llava.backbones.base import Backbone, find_backbone
from delo_llava.config import load_config
from delo_llava.data.images import ImageLimits
from delo_llava.errors import DeloError


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
