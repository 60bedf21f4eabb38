"""SmolVLM and SmolVLM2 (`smolvlm`), and Idefics3: tiles with their places in words, and the whole picture.

Limits: most image processors enlarge small pictures first, so every picture has some 13 tiles.
"""

from itertools import chain
from typing import Any

from PIL import Image
from torch import Tensor

from delo_llava.backbones._planned import PlannedImage, tile_patches, tower_floats
from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import EncodedImage

#: The last: tiles of 1024×768, which are 4×3 and the whole picture.
FAKE, NEW_ROW, PLANNED_TILES = "<fake_token_around_image>", "\n", 13


class SmolVLM(Backbone):
    """A turn is `User:…<end_of_utterance>`; a space follows the colon only where no picture does."""

    model_types = ("smolvlm",)
    language_pattern = r"model\.text_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    projector_pattern = r"model\.connector\.modality_projection\.proj"
    projector_name = "model.connector"
    unquantised = ("model.vision_model", "model.connector", "lm_head")
    image_token = "<image>"
    default_dialogue = Dialogue(
        "User: ", "User:", "", "<end_of_utterance>\nAssistant:", " ", "<end_of_utterance>", bos=True
    )

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` tiles×1×3×H×W, `pixel_attention_mask` tiles×1×H×W."""
        encoded = parts.image_processor([image], return_row_col_info=True, return_tensors="pt")
        inputs = {key: encoded[key][0].unsqueeze(1) for key in ("pixel_values", "pixel_attention_mask")}
        rows, columns = encoded["rows"][0][0], encoded["cols"][0][0]
        places = ((row, column) for row in range(rows) for column in range(columns))
        marks = [f"{NEW_ROW * (c == 0 < r)}{FAKE}<row_{r + 1}_col_{c + 1}>" for r, c in places]
        marks.append(f"{NEW_ROW * 2 * (rows > 0)}{FAKE}<global-img>")
        pairs = (((mark, 1), (self.image_token, tile_tokens(parts.config))) for mark in marks)
        return EncodedImage(inputs, (*chain.from_iterable(pairs), (FAKE, 1)), len(marks))

    def tiny_image(self, parts: Parts) -> dict[str, Tensor]:
        """One tile: these image processors enlarge even the smallest picture."""
        return {name: tensor[-1:] for name, tensor in super().tiny_image(parts).items()}

    def planned_image(self, config: Any) -> PlannedImage:
        """As many tiles as a picture of any size has."""
        patches = PLANNED_TILES * tile_patches(config.vision_config)
        return PlannedImage(PLANNED_TILES * tile_tokens(config), patches, tower_floats(config.vision_config))


def tile_tokens(config: Any) -> int:
    """Tokens of one tile: patches are put together, `scale_factor` along each side."""
    return tile_patches(config.vision_config) // int(config.scale_factor) ** 2


BACKBONE = SmolVLM()
