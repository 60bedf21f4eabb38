"""Qwen3-VL (`qwen3_vl`): ChatML without a system text, 32 pixels a token, DeepStack.

Limits: the mergers of DeepStack stay frozen (they run before anything is known of the picture).
"""

from delo_llava.backbones._qwen import QwenVL
from delo_llava.data.dialogue import chatml


class Qwen3VL(QwenVL):
    """Qwen3-VL of any size; its first language layers add features of several depths of the tower."""

    model_types = ("qwen3_vl",)
    projector_pattern = r"model\.visual\.merger\.linear_fc[12]"
    default_dialogue = chatml("", "<|vision_start|>", "<|vision_end|>")


BACKBONE = Qwen3VL()
