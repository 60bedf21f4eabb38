"""Qwen2.5-VL (`qwen2_5_vl`): ChatML, a picture of any size, 28 pixels a token."""

from delo_llava.backbones._qwen import QwenVL


class Qwen25VL(QwenVL):
    """Qwen2.5-VL of any size."""

    model_types = ("qwen2_5_vl",)


BACKBONE = Qwen25VL()
