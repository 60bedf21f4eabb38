"""Qwen2.5-VL (`qwen2_5_vl`): see `_qwen`."""

from delo_llava.backbones._qwen import QwenVL


class Qwen25VL(QwenVL):
    """Qwen2.5-VL of any size."""

    model_types = ("qwen2_5_vl",)


BACKBONE = Qwen25VL()
