"""Backbones: names and widths on real 7B and 13B configs, loading, 4 bit, batched forward and generation."""

import re
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from torch import nn

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
