"""What Qwen2-VL and Qwen2.5-VL share: ChatML, a patch merger as projector, any image size, 3-D positions."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils import is_torchvision_available

from delo_llava.backbones.base import OWN_CODE, Backbone, config_of
from delo_llava.data.collate import SEGMENT_CONTEXT, SEGMENT_IMAGE, SEGMENT_INSTRUCTION, SEGMENT_OTHER

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


class ImageTextProcessor(ProcessorMixin):
    """Image processor and tokenizer of a checkpoint, without its video processor, which needs torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class QwenVL(Backbone):
    """The number of an image's tokens follows from its size: one for each merged block of patches."""

    projector_pattern = r"model\.visual\.merger\.mlp\.[02]"
    projector_name = "model.visual.merger"
    unquantised = ("model.visual", "lm_head")
    image_token = "<|image_pad|>"
    adds_bos = False
    answer_end = "<|im_end|>"

    def load_processor(self, path: str) -> Any:
        """The stock processor; without torchvision, the same parts with PIL for images and no video."""
        if is_torchvision_available():
            return AutoProcessor.from_pretrained(path, **OWN_CODE)
        image_processor, tokenizer = (
            AutoImageProcessor.from_pretrained(path, **OWN_CODE),
            AutoTokenizer.from_pretrained(path, **OWN_CODE),
        )
        return ImageTextProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def prompt(self, has_image: bool, context: str | None, instruction: str) -> list[tuple[str, int]]:
        """ChatML, one user turn: the image between its markers, `Context: {context}`, the instruction."""
        pieces = [(f"{SYSTEM}<|im_start|>user\n", SEGMENT_OTHER)]
        if has_image:
            pieces += [
                ("<|vision_start|>", SEGMENT_OTHER),
                (self.image_token, SEGMENT_IMAGE),
                ("<|vision_end|>", SEGMENT_OTHER),
            ]
        if context is not None:
            pieces += [("Context: ", SEGMENT_OTHER), (context, SEGMENT_CONTEXT), ("\n", SEGMENT_OTHER)]
        return [
            *pieces,
            (instruction, SEGMENT_INSTRUCTION),
            (f"{self.answer_end}\n<|im_start|>assistant\n", SEGMENT_OTHER),
        ]

    def answer_suffix(self, answer: str) -> str:
        """`{answer}<|im_end|>`"""
        return f"{answer}{self.answer_end}"

    def encode_images(
        self, processor: Any, images: Sequence[Image.Image]
    ) -> tuple[dict[str, Tensor], list[int]]:
        """`pixel_values` (all patches)×(values), `image_grid_thw` N×3 in patches; merged patches of each."""
        encoded = processor.image_processor(images=list(images), return_tensors="pt")
        grid = encoded["image_grid_thw"]
        tokens = grid.prod(-1) // processor.image_processor.merge_size**2
        return {"pixel_values": encoded["pixel_values"], "image_grid_thw": grid}, tokens.tolist()

    def sequence_inputs(self, segments: Tensor) -> dict[str, Tensor]:
        """`mm_token_type_ids` B×S (1 at image tokens), from which the model derives its 3-D positions."""
        return {"mm_token_type_ids": (segments == SEGMENT_IMAGE).int()}

    def tiny_image(self, model: nn.Module) -> dict[str, Tensor]:
        """One merged patch of zeros."""
        vision = config_of(model).vision_config
        side = vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(side**2, width),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
