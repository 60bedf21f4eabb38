"""Backbones: names and widths on real 7B and 13B configs, loading, 4 bit, batched forward and generation."""

import re
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
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
    Backbone,
    adapted_linears,
    attention_choices,
    find_backbone,
    resolve_dtype,
)
from delo_llava.data.collate import SEGMENT_IMAGE, Collator
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.tasks import Record

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@cache
def loaded(kind: str, quant: str = "none"):
    backbone, path = find_backbone(tiny_models.session(kind))
    return backbone, backbone.load(path, quant=quant, device="cpu"), backbone.load_processor(path)


@pytest.fixture
def items(tmp_path: Path):
    """Six records: three complete (sizes differ), one each without image, without text, without both."""
    rows = []
    shown = [(True, True), (False, True), (True, True), (True, False), (False, False), (True, True)]
    for i, has in enumerate(shown):
        path = tmp_path / f"{i}.png"
        Image.effect_noise((64 + 32 * i, 64), 80.0).convert("RGB").save(path)
        context = "hint: " + "it comes after " * i + "six"
        rows.append(
            (Record(f"r{i}", "t", "train", path, context, f"which number is shown? {i}", "four"), has)
        )
    return rows


# ---- the real checkpoints' shapes ----------------------------------------


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


# ---- finding ----------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_family_is_read_from_the_config(kind: str, tmp_path: Path) -> None:
    misnamed = tmp_path / "llava-qwen2_vl-qwen2_5_vl"
    misnamed.symlink_to(tiny_models.session(kind), target_is_directory=True)
    backbone, path = find_backbone(misnamed)
    assert kind in backbone.model_types
    assert path == str(misnamed)


def test_plugins_are_the_families() -> None:
    assert set(FAMILIES) <= set(plugin_names("backbone"))
    assert all(isinstance(load_plugin("backbone", name), Backbone) for name in plugin_names("backbone"))


def test_bad_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="no such model"):
        find_backbone("mini-lava")
    with pytest.raises(DeloError, match="no such model"):
        find_backbone(tmp_path / "nothing")
    with pytest.raises(DeloError, match=r"config\.json is missing"):
        find_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llavas"}')
    with pytest.raises(DeloError, match=r"(?s)llavas.*did you mean llava"):
        find_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeloError, match="no model_type"):
        find_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DeloError, match="cannot be read"):
        find_backbone(tmp_path)


def test_a_model_laid_out_otherwise_is_refused() -> None:
    backbone, model, _ = loaded("llava")
    with pytest.raises(DeloError, match="no projector linear"):
        adapted_linears(model, load_plugin("backbone", "qwen2_vl"))
    with pytest.raises(DeloError, match="no language linear"):
        adapted_linears(nn.Linear(2, 2), backbone)


# ---- loading ----------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_loaded_model_is_frozen_and_decodes_plainly(kind: str) -> None:
    backbone, model, processor = loaded(kind)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.do_sample is False
    token = processor.tokenizer.convert_tokens_to_ids(backbone.image_token)
    assert backbone.image_token_id(model) == token
    assert len(adapted_linears(model, backbone)) == 2 * 7 + 2


def test_choices_are_checked() -> None:
    backbone, path = find_backbone(tiny_models.session("llava"))
    for wrong in ({"quant": "nf5"}, {"dtype": "float31"}, {"attn": "sdpb"}, {"device": "cpv"}):
        with pytest.raises(DeloError, match=str(next(iter(wrong.values())))):
            backbone.load(path, **({"device": "cpu"} | wrong))
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", CUDA) == torch.bfloat16
    assert attention_choices("auto", CPU, torch.bfloat16)[0] == "sdpa"
    with pytest.raises(DeloError, match="flash_attention_2 needs"):
        attention_choices("flash_attention_2", CPU, torch.bfloat16)


def test_flash_attention_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn" else None)
    assert attention_choices("auto", CUDA, torch.bfloat16)[0] == "flash_attention_2"
    assert attention_choices("auto", CUDA, torch.float32)[0] == "sdpa"
    assert attention_choices("auto", CPU, torch.bfloat16)[0] == "sdpa"


# ---- running ----------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_nf4_equals_the_dequantised_model(kind: str, items) -> None:
    backbone, path = find_backbone(tiny_models.session(kind))
    model = backbone.load(path, quant="nf4", device="cpu")
    batch = Collator(backbone, loaded(kind)[2], 512)(items)
    quantised = set(_quant.quantised_linears(model))
    assert quantised == {
        n for n in adapted_linears(model, backbone) if re.fullmatch(backbone.language_pattern, n)
    }
    with torch.no_grad():
        four_bit = model(**batch.inputs).logits
        full = loaded(kind)[1](**batch.inputs).logits
        assert _quant.dequantise_(model) == len(quantised) == 14
        assert not _quant.quantised_linears(model)
        plain = model(**batch.inputs).logits
    seen = batch.inputs["attention_mask"].bool()
    assert (four_bit - plain)[seen].abs().max() <= 1e-5
    assert (four_bit - full)[seen].abs().max() > 1e-3, "4 bit changed nothing: was it quantised?"
    assert len(adapted_linears(model, backbone)) == 2 * 7 + 2


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_pass_a_4_bit_base_that_has_answered_before(kind: str, items) -> None:
    """bitsandbytes' fast CPU path would repack weights at the first answer and cut gradients from then on."""
    backbone, path = find_backbone(tiny_models.session(kind))
    model = backbone.load(path, quant="nf4", device="cpu")
    batch = Collator(backbone, loaded(kind)[2], 512)(items)
    gradients = []
    for _ in range(2):
        projector = backbone.projector(model).requires_grad_(True)
        model(**batch.inputs, labels=batch.labels).loss.backward()
        gradients.append([p.grad.clone() for p in projector.parameters()])
        model.zero_grad()
        with torch.no_grad():
            model.requires_grad_(False)(**batch.inputs)
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_alone_equals_the_row_in_a_mixed_batch(kind: str, items) -> None:
    """Images present and absent in one batch; a row's logits depend neither on the others nor on padding."""
    backbone, model, processor = loaded(kind)
    for generation in (False, True):
        collator = Collator(backbone, processor, 512, generation=generation)
        batch = collator(items)
        with torch.no_grad():
            together = model(**batch.inputs).logits
            for row, item in enumerate(items):
                alone = model(**collator([item]).inputs).logits[0]
                seen = batch.inputs["attention_mask"][row].bool()
                assert (together[row][seen] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_projector_output_matches_the_batch_description(kind: str, items) -> None:
    """`image_units` are the projector's outputs in order, and `segments` has as many image positions."""
    backbone, model, processor = loaded(kind)
    batch = Collator(backbone, processor, 512)(items)
    outputs = []
    hook = backbone.projector(model).register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        model(**batch.inputs)
    hook.remove()
    per_row = (batch.segments == SEGMENT_IMAGE).sum(1)
    assert outputs[0].flatten(0, -2).shape == (int(per_row.sum()), backbone.hidden_size(model))
    assert len(outputs[0]) == int(batch.image_units.sum())
    tokens = outputs[0].shape[:-1].numel() // len(outputs[0])
    assert per_row[batch.image_rows].tolist() == (batch.image_units * tokens).tolist()
    assert batch.image_rows.tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_image_and_the_context_reach_the_logits(kind: str, items) -> None:
    backbone, model, processor = loaded(kind)
    collator = Collator(backbone, processor, 512, generation=True)
    record = items[0][0]
    views = [collator([(record, has)]) for has in ((True, True), (False, True), (True, False))]
    swapped = views[0].inputs | {"pixel_values": torch.zeros_like(views[0].inputs["pixel_values"])}
    with torch.no_grad():
        last = [model(**inputs).logits[0, -1] for inputs in (*(view.inputs for view in views), swapped)]
    assert all((last[0] - other).abs().max() > 1e-4 for other in last[1:])


@pytest.mark.parametrize("kind", FAMILIES)
def test_generate_in_batches_equals_one_by_one(kind: str, items) -> None:
    backbone, model, processor = loaded(kind)
    collator = Collator(backbone, processor, 512, generation=True)

    def answers(rows) -> list[list[int]]:
        batch = collator(rows)
        out = model.generate(**batch.inputs, max_new_tokens=6)[:, batch.inputs["input_ids"].shape[1] :]
        end = model.generation_config.eos_token_id
        return [row[: row.index(end)] if end in row else row for row in out.tolist()]

    single = [answers([item])[0] for item in items]
    assert answers(items) == single
    assert len({tuple(row) for row in single}) > 1, "all answers are equal, so this test shows nothing"
    without = [(record, (False, has[1])) for record, has in items]
    assert answers(without) == [answers([item])[0] for item in without]
    assert "pixel_values" not in collator(without).inputs


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_forward_after_generation_starts_afresh(kind: str, items) -> None:
    """Qwen keeps position offsets of its last prompt on the model; a text-only batch must not take them."""
    backbone, model, processor = loaded(kind)
    text_only = Collator(backbone, processor, 512)([(record, (False, True)) for record, _ in items[:3]])
    prompt = Collator(backbone, processor, 512, generation=True)(items)
    with torch.no_grad():
        model.generate(**prompt.inputs, max_new_tokens=2)
        after = model(**text_only.inputs).logits
        fresh = backbone.load(str(tiny_models.session(kind)), quant="none", device="cpu")(
            **text_only.inputs
        ).logits
    assert torch.equal(after, fresh)


@pytest.mark.parametrize("kind", FAMILIES)
def test_tiny_models_are_small_and_reproducible(kind: str, tmp_path: Path) -> None:
    assert sum(p.numel() for p in loaded(kind)[1].parameters()) < 1_000_000
    again = tiny_models.BUILDERS[kind](tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (tiny_models.session(kind) / name).read_bytes()


def test_the_shipped_model_loads_by_name(items) -> None:
    backbone, path = find_backbone("mini-llava")
    model, processor = backbone.load(path, quant="nf4", device="cpu"), backbone.load_processor(path)
    assert len(adapted_linears(model, backbone)) == 7 * model.config.text_config.num_hidden_layers + 2
    batch = Collator(backbone, processor, 512)(items)
    assert (batch.segments == SEGMENT_IMAGE).sum(1).tolist() == [16, 0, 16, 16, 0, 16]
    assert batch.inputs["input_ids"][:, 0].tolist() == [processor.tokenizer.bos_token_id] * 6
    with torch.no_grad():
        assert model(**batch.inputs, labels=batch.labels).loss.isfinite()
