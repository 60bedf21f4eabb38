"""Qwen3-VL with mixtures of experts (`qwen3_vl_moe`).

Limits: the mixtures' experts are neither adapted nor quantised (their weights are no linears), which leaves
most of the model in full precision; DeepStack's mergers stay frozen.
"""

from delo_llava.backbones.qwen3_vl import Qwen3VL


class Qwen3VLMoe(Qwen3VL):
    """As Qwen3-VL; of the language layers the attention is adapted, and the MLP of layers without experts."""

    model_types = ("qwen3_vl_moe",)


BACKBONE = Qwen3VLMoe()
