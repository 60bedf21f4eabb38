"""The published checkpoints' shapes, on the meta device: what is adapted, what is quantised."""

from functools import cache

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

from delo_llava.backbones import _quant
from delo_llava.backbones.base import (
    adapted_linears,
)
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin


def llava_config(hidden: int, layers: int, heads: int, intermediate: int) -> LlavaConfig:
    """LLaVA-1.5: CLIP ViT-L/14 at 336 px, Vicuna 7B or 13B."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000, image_seq_length=576)


def qwen_config(config_class, vision: dict):
    """Qwen2-VL-7B and Qwen2.5-VL-7B share the language model: GQA, 28 heads on 4 key/value heads of 128."""
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    return config_class(text_config=text, vision_config=vision, tie_word_embeddings=False)


QWEN2_VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
}
QWEN2_5_VISION = {
    "depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def llama_widths(h: int, m: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (h, h),
        "self_attn.v_proj": (h, h), "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (h, m), "mlp.up_proj": (h, m), "mlp.down_proj": (m, h),
    }  # fmt: skip


def llava_projector(h: int) -> dict[str, tuple[int, int]]:
    name = "model.multi_modal_projector.linear"
    return {f"{name}_1": (1024, h), f"{name}_2": (h, h)}


QWEN_WIDTHS = llama_widths(3584, 18944) | {"self_attn.k_proj": (3584, 512), "self_attn.v_proj": (3584, 512)}
QWEN_MERGER = {"model.visual.merger.mlp.0": (5120, 5120), "model.visual.merger.mlp.2": (5120, 3584)}

# family, config, layers, widths of one layer, widths of the projector, all parameters
REAL = {
    "llava-1.5-7b": (
        "llava", lambda: llava_config(4096, 32, 32, 11008), 32, llama_widths(4096, 11008),
        llava_projector(4096),
        7_063_427_072,
    ),
    "llava-1.5-13b": (
        "llava", lambda: llava_config(5120, 40, 40, 13824), 40, llama_widths(5120, 13824),
        llava_projector(5120),
        13_351_494_656,
    ),
    "qwen2-vl-7b": (
        "qwen2_vl", lambda: qwen_config(Qwen2VLConfig, QWEN2_VISION), 28, QWEN_WIDTHS, QWEN_MERGER,
        8_291_375_616,
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl", lambda: qwen_config(Qwen2_5_VLConfig, QWEN2_5_VISION), 28, QWEN_WIDTHS, QWEN_MERGER,
        8_292_166_656,
    ),
}  # fmt: skip


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(REAL[name][1]())


@pytest.mark.parametrize("name", REAL)
def test_targets_on_the_real_config(name: str) -> None:
    family, _, layers, widths, projector, parameters = REAL[name]
    backbone, model = load_plugin("backbone", family), on_meta(name)
    expected = {
        f"model.language_model.layers.{i}.{part}": w for i in range(layers) for part, w in widths.items()
    }
    assert adapted_linears(model, backbone) == expected | projector
    assert len(expected | projector) == layers * 7 + 2
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert backbone.hidden_size(model) == widths["self_attn.q_proj"][0]
    assert backbone.projector(model) is model.get_submodule(backbone.projector_name)
    lora = sum(8 * (i + o) for i, o in adapted_linears(model, backbone).values())
    layer = sum(8 * (i + o) for i, o in widths.values())
    assert lora == layers * layer + sum(8 * (i + o) for i, o in projector.values())


@pytest.mark.parametrize("name", REAL)
def test_4_bit_takes_language_linears_only_on_the_real_config(name: str) -> None:
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    backbone = load_plugin("backbone", REAL[name][0])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(REAL[name][1]())
    config = _quant.nf4_config(torch.float32, backbone.unquantised)
    replace_with_bnb_linear(model, list(backbone.unquantised), config)
    assert len(_quant.quantised_linears(model)) == REAL[name][2] * 7
    _quant.check_quantised(model, backbone.language_pattern)
    assert len(adapted_linears(model, backbone)) == REAL[name][2] * 7 + 2


def test_a_bare_skip_name_would_quantise_the_tower_and_is_noticed() -> None:
    """The trap: `vision_tower` does not match `model.vision_tower.…` from the start."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(REAL["llava-1.5-7b"][1]())
    replace_with_bnb_linear(
        model, ["vision_tower", "lm_head"], _quant.nf4_config(torch.float32, ["vision_tower"])
    )
    with pytest.raises(DeloError, match="quantised that should not"):
        _quant.check_quantised(model, load_plugin("backbone", "llava").language_pattern)
