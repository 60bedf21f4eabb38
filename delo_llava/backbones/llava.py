"""LLaVA-1.5 and its kin (`LlavaForConditionalGeneration`): vision tower, MLP projector, language model."""

from PIL import Image

from delo_llava.backbones.base import Backbone, Parts
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import EncodedImage


class Llava(Backbone):
    """Vicuna-style dialogue; every image has the same number of tokens."""

    model_types = ("llava",)
    projector_pattern = r"model\.multi_modal_projector\.linear_[12]"
    image_token = "<image>"
    default_dialogue = Dialogue("USER: ", "USER: ", "\n", " ASSISTANT:", " ", "</s>", bos=True)

    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """`pixel_values` 1×3×H×W; one token for each patch that the tower keeps."""
        pixels = parts.image_processor([image], return_tensors="pt")["pixel_values"]
        side, kept = parts.config.vision_config.patch_size, parts.config.vision_feature_select_strategy
        tokens = (pixels.shape[-2] // side) * (pixels.shape[-1] // side) - (kept == "default")
        # A CLIP tower puts its class token first; other towers have none.
        tokens += parts.config.vision_config.model_type.startswith("clip")
        return EncodedImage({"pixel_values": pixels}, ((self.image_token, int(tokens)),), 1)


BACKBONE = Llava()
