"""What LLaVA-NeXT and LLaVA-OneVision share: a picture whole, and again in tiles of the nearest grid, where
it is letterboxed and the language model does not see the bars."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from delo_llava.backbones._planned import HEIGHT, WIDTH, PlannedImage, tile_patches, tower_floats
from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.images import EncodedImage


class AnyRes(Backbone):
    """Tokens: the whole picture, then the grid's rows without bars, each with a vector for the line's end."""

    projector_pattern = r"model\.multi_modal_projector\.linear_[12]"
    image_token = "<image>"

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` tiles×3×H×W, `image_sizes` 1×2 (height, width)."""
        encoded = parts.image_processor([image], return_tensors="pt")
        inputs = {"pixel_values": encoded["pixel_values"][0], "image_sizes": encoded["image_sizes"]}
        tiles, seen = grid(parts.config, image.height, image.width)
        whole = tile_patches(parts.config.vision_config)
        kept = torch.zeros(tiles * whole, dtype=torch.bool)
        kept[:whole] = True
        kept[whole + seen.flatten()] = True
        tokens = whole + self.grid_tokens(parts.config, *seen.shape)
        return EncodedImage(inputs, ((self.image_token, tokens),), tiles, kept)

    def grid_tokens(self, config: Any, rows: int, columns: int) -> int:
        """Tokens of a grid of so many patches without bars."""
        return rows * (columns + 1)

    def planned_image(self, config: Any) -> PlannedImage:
        """As a picture of that size is cut."""
        tiles, seen = grid(config, HEIGHT, WIDTH)
        whole = tile_patches(config.vision_config)
        tokens = whole + self.grid_tokens(config, *seen.shape)
        return PlannedImage(tokens, tiles * whole, tower_floats(config.vision_config))


def grid(config: Any, height: int, width: int) -> tuple[int, Tensor]:
    """Tiles of a picture, the whole one included, and which patches of the others lie in it, int64
    rows×columns: their places among the grid's patches, tile after tile.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    down, right = get_anyres_image_grid_shape([height, width], config.image_grid_pinpoints, vision.image_size)
    places = torch.arange(down * right * side**2).view(down, right, side, side)
    flat = places.transpose(1, 2).reshape(1, down * side, right * side)
    return down * right + 1, unpad_image(flat, [height, width])[0]
