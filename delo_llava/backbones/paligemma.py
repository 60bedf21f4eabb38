"""PaliGemma and PaliGemma 2 (`paligemma`): a picture of fixed size, then BOS and the text; no dialogue.

Limits: no flash attention (every prompt token sees all others, a mask that it would drop without a word).
"""

from typing import Any

from PIL import Image
from torch import Tensor

from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import EncodedImage


class PaliGemma(Backbone):
    """BOS stands between picture and text, so it is written out. PaliGemma 2 has eager attention only."""

    model_types = ("paligemma",)
    projector_pattern = r"model\.multi_modal_projector\.linear"
    image_token = "<image>"
    attention = ("sdpa", "eager")
    default_dialogue = Dialogue("<bos>", "", "<bos>", "\n", "", "<eos>", bos=False)

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` 1×3×S×S; every patch a token."""
        pixels = parts.image_processor([image], return_tensors="pt")["pixel_values"]
        tokens = (pixels.shape[-1] // parts.config.vision_config.patch_size) ** 2
        return EncodedImage({"pixel_values": pixels}, ((self.image_token, tokens),), 1)

    def dialogue(self, tokenizer: Any, template: str | None) -> Dialogue:
        """Its own, whatever a checkpoint brings: the model was trained on no turns."""
        return self.default_dialogue

    def sequence_inputs(self, segments: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """`token_type_ids` B×S: 1 on the answer, which alone is causal."""
        return {"token_type_ids": answers.long()}


BACKBONE = PaliGemma()
