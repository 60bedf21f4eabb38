"""Gemma 3 with pictures (`gemma3`; 4B, 12B, 27B): 256 tokens for a picture of any size.

Limits: no flash attention (it would drop the mask of image tokens without a word); pan-and-scan is off.
"""

from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor, nn

from delo_llava.backbones._gemma3_projector import Projector
from delo_llava.backbones._planned import PlannedImage, tile_patches, tower_floats
from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import EncodedImage
from delo_llava.data.segments import SEGMENT_IMAGE


class Gemma3(Backbone):
    """A picture's tokens stand between marks, and these between empty lines, which are the dialogue's."""

    model_types = ("gemma3",)
    projector_pattern = r"model\.multi_modal_projector\.project"
    image_token = "<image_soft_token>"
    placeholders = ("<start_of_image>",)
    attention = ("sdpa", "eager")
    default_dialogue = Dialogue(
        "<start_of_turn>user\n", "<start_of_turn>user\n\n\n", "\n\n",
        "<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>", bos=True,
    )  # fmt: skip

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` 1×3×S×S; always as many tokens."""
        pixels = parts.image_processor([image], do_pan_and_scan=False, return_tensors="pt")["pixel_values"]
        middle = (self.image_token, parts.config.mm_tokens_per_image)
        layout = (("<start_of_image>", 1), middle, ("<end_of_image>", 1))
        return EncodedImage({"pixel_values": pixels}, layout, 1)

    def planned_image(self, config: Any) -> PlannedImage:
        """One tile, its tokens pooled."""
        tower = config.vision_config
        return PlannedImage(config.mm_tokens_per_image, tile_patches(tower), tower_floats(tower))

    def dialogue(self, tokenizer: Any, template: str | None) -> Dialogue:
        """Templates leave the empty lines around a picture to the processor."""
        found, gap = super().dialogue(tokenizer, template), "" if template is None else "\n\n"
        return replace(found, image_head=found.image_head + gap, image_tail=gap + found.image_tail)

    def sequence_inputs(self, segments: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """`token_type_ids` B×S: 1 at image tokens, which see each other both ways."""
        return {"token_type_ids": (segments == SEGMENT_IMAGE).long()}

    def prepare(self, model: nn.Module) -> None:
        """Let the projector, whose weight is a bare parameter, be a linear that can be adapted."""
        inner: Any = model.get_submodule("model")
        inner.multi_modal_projector = Projector(inner.multi_modal_projector)


BACKBONE = Gemma3()
