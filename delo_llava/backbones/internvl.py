"""InternVL 2.5, 3 and 3.5 as transformers has them (`internvl`): tiles of 448 pixels, 256 tokens each.

Limits: checkpoints with code of their own (`internvl_chat`) are not loaded, their `-hf` forms are; experts of
mixtures are neither adapted nor quantised.
"""

from typing import Any

from PIL import Image

from delo_llava.backbones._planned import PlannedImage, tile_patches, tower_floats
from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.dialogue import chatml
from delo_llava.data.images import EncodedImage

#: Tiles of 1024×768 at the processor's own limit of twelve: 4×3, and the whole picture.
PLANNED_TILES = 13


class InternVL(Backbone):
    """A picture is cut into up to twelve tiles nearest to its form, and shown whole beside them."""

    model_types = ("internvl",)
    projector_pattern = r"model\.multi_modal_projector\.linear_[12]"
    image_token = "<IMG_CONTEXT>"
    placeholders = ("<IMG_CONTEXT>", "<image>")
    limits = {"max_tiles": "max_patches"}
    default_dialogue = chatml("", "", "\n")

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` tiles×3×H×W; the tokens of all tiles between `<img>` and `</img>`."""
        encoded = parts.image_processor([image], crop_to_patches=True, return_tensors="pt")
        tiles = len(encoded["pixel_values"])
        tokens = parts.config.image_seq_length * tiles
        layout = (("<img>", 1), (self.image_token, tokens), ("</img>", 1))
        return EncodedImage({"pixel_values": encoded["pixel_values"]}, layout, tiles)

    def planned_image(self, config: Any) -> PlannedImage:
        """Twelve tiles and the whole picture."""
        patches = PLANNED_TILES * tile_patches(config.vision_config)
        tokens = PLANNED_TILES * config.image_seq_length
        return PlannedImage(tokens, patches, tower_floats(config.vision_config))


BACKBONE = InternVL()
