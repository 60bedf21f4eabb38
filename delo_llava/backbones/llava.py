"""LLaVA-1.5 and its kin (`LlavaForConditionalGeneration`): vision tower, MLP projector, language model."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from delo_llava.backbones.base import OWN_CODE, Backbone, config_of
from delo_llava.data.collate import SEGMENT_CONTEXT, SEGMENT_IMAGE, SEGMENT_INSTRUCTION, SEGMENT_OTHER


class Llava(Backbone):
    """Vicuna-style dialogue; every image has the same number of tokens."""

    model_types = ("llava",)
    projector_pattern = r"model\.multi_modal_projector\.linear_[12]"
    projector_name = "model.multi_modal_projector"
    unquantised = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    image_token = "<image>"
    adds_bos = True
    answer_end = "</s>"

    def load_processor(self, path: str) -> Any:
        """The stock processor. Fields that older checkpoints lack come from the model's config."""
        from transformers import AutoConfig, AutoProcessor

        processor = AutoProcessor.from_pretrained(path, **OWN_CODE)
        if processor.patch_size is None or processor.vision_feature_select_strategy is None:
            config = AutoConfig.from_pretrained(path, **OWN_CODE)
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            # A CLIP tower puts its class token first; other towers have none.
            processor.num_additional_image_tokens = int(config.vision_config.model_type.startswith("clip"))
        return processor

    def prompt(self, has_image: bool, context: str | None, instruction: str) -> list[tuple[str, int]]:
        """`USER: <image>\\nContext: {context}\\n{instruction} ASSISTANT:`"""
        pieces = [("USER: ", SEGMENT_OTHER)]
        if has_image:
            pieces += [(self.image_token, SEGMENT_IMAGE), ("\n", SEGMENT_OTHER)]
        if context is not None:
            pieces += [("Context: ", SEGMENT_OTHER), (context, SEGMENT_CONTEXT), ("\n", SEGMENT_OTHER)]
        return [*pieces, (instruction, SEGMENT_INSTRUCTION), (" ASSISTANT:", SEGMENT_OTHER)]

    def answer_suffix(self, answer: str) -> str:
        """` {answer}</s>`"""
        return f" {answer}{self.answer_end}"

    def encode_images(
        self, processor: Any, images: Sequence[Image.Image]
    ) -> tuple[dict[str, Tensor], list[int]]:
        """`pixel_values` N×3×H×W, and the tokens the tower keeps of each image."""
        pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        height, width = pixels.shape[-2:]
        tokens = (height // processor.patch_size) * (
            width // processor.patch_size
        ) + processor.num_additional_image_tokens
        tokens -= processor.vision_feature_select_strategy == "default"
        return {"pixel_values": pixels}, [int(tokens)] * len(images)

    def tiny_image(self, model: nn.Module) -> dict[str, Tensor]:
        """One image of zeros."""
        size = config_of(model).vision_config.image_size
        return {"pixel_values": torch.zeros(1, 3, size, size)}


BACKBONE = Llava()
