"""What the Qwen families share: ChatML, a patch merger as projector, any image size, 3-D positions."""

from typing import Any

from PIL import Image
from torch import Tensor

from delo_llava.backbones._planned import HEIGHT, WIDTH, PlannedImage, tower_floats
from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.dialogue import chatml
from delo_llava.data.images import EncodedImage
from delo_llava.data.segments import SEGMENT_IMAGE

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


class QwenVL(Backbone):
    """The number of an image's tokens follows from its size: one for each merged block of patches."""

    projector_pattern = r"model\.visual\.merger\.mlp\.[02]"
    projector_name = "model.visual.merger"
    unquantised = ("model.visual", "lm_head")
    image_token = "<|image_pad|>"
    limits = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
    default_dialogue = chatml(SYSTEM, "<|vision_start|>", "<|vision_end|>")

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` patches×values, `image_grid_thw` 1×3 in patches; one token for merged patches."""
        encoded = parts.image_processor(images=[image], return_tensors="pt")
        tokens = int(encoded["image_grid_thw"].prod()) // parts.image_processor.merge_size**2
        inputs = {key: encoded[key] for key in ("pixel_values", "image_grid_thw")}
        return EncodedImage(inputs, ((self.image_token, tokens),), tokens)

    def planned_image(self, config: Any) -> PlannedImage:
        """Sides rounded to whole merged patches."""
        vision = config.vision_config
        side, merged = vision.patch_size * vision.spatial_merge_size, vision.spatial_merge_size**2
        tokens = round(HEIGHT / side) * round(WIDTH / side)
        return PlannedImage(tokens, tokens * merged, tower_floats(vision))

    def sequence_inputs(self, segments: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """`mm_token_type_ids` B×S (1 at image tokens), from which the model derives its 3-D positions."""
        return {"mm_token_type_ids": (segments == SEGMENT_IMAGE).int()}
