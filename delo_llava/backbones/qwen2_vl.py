"""Qwen2-VL (`qwen2_vl`): ChatML, a picture of any size, 28 pixels a token."""

from delo_llava.backbones._qwen import QwenVL


class Qwen2VL(QwenVL):
    """Qwen2-VL of any size."""

    model_types = ("qwen2_vl",)


BACKBONE = Qwen2VL()
