"""Prompts of every family: the stock processors' token ids, templates cut into dialogues, what is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from family_support import KINDS, batch, items, loaded
from transformers import (
    AutoProcessor,
    Gemma3Processor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    ProcessorMixin,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)

from delo_llava.backbones._template import from_template, require_end_token
from delo_llava.backbones.base import attention_choices, find_backbone
from delo_llava.data.images import load_image
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

#: Processors whose video part needs what is not installed; their image part is used without it.
PARTIAL = {
    "qwen2_vl": Qwen3VLProcessor, "qwen2_5_vl": Qwen3VLProcessor, "qwen3_vl": Qwen3VLProcessor,
    "qwen3_vl_moe": Qwen3VLProcessor, "internvl": InternVLProcessor,
    "llava_onevision": LlavaOnevisionProcessor, "smolvlm": SmolVLMProcessor,
}  # fmt: skip


def stock(kind: str) -> Any:
    """The stock processor, without its video part where that cannot be made here, told what the tiny model's
    folder does not say."""
    backbone, _, parts = loaded(kind)
    token_id = parts.tokenizer.convert_tokens_to_ids
    if kind == "gemma3":
        marks = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": backbone.image_token}
        for name, mark in marks.items():
            setattr(parts.tokenizer, f"{name}_token", mark)
            setattr(parts.tokenizer, f"{name}_token_id", token_id(mark))
    made: Any = _whole(kind) if kind not in PARTIAL else _partial(kind)
    facts = {"patch_size": 16, "image_seq_len": 4, "num_image_tokens": 16}
    facts["image_seq_length"] = 16 if kind.startswith("paligemma") else 4
    facts["num_additional_image_tokens"] = int(kind in ("llava", "llava_next"))
    facts["vision_feature_select_strategy"] = "full" if kind == "llava_onevision" else "default"
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def _whole(kind: str) -> Any:
    _, _, parts = loaded(kind)
    if kind == "gemma3":
        return Gemma3Processor(parts.image_processor, parts.tokenizer, image_seq_length=4)
    return AutoProcessor.from_pretrained(tiny_models.session(kind))


def _partial(kind: str) -> Any:
    backbone, _, parts = loaded(kind)
    marks = {
        "image_token": backbone.image_token, "video_token": "<video>", "start_image_token": "<img>",
        "end_image_token": "</img>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }  # fmt: skip

    class Partial(PARTIAL[kind]):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **more: Any) -> None:
            for name, mark in marks.items():
                setattr(self, name, mark)
                setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
            self.vision_aspect_ratio = "anyres_max_3"
            pattern = f"(?P<image>{re.escape(self.image_token)})|(?P<video>{re.escape(self.video_token)})"
            self.multimodal_pattern = re.compile(pattern)
            ProcessorMixin.__init__(self, image_processor, tokenizer)

    return Partial(parts.image_processor, parts.tokenizer)


def asked(kind: str, row: int) -> str:
    """The record's question as the checkpoint's template writes it."""
    record, (_, has_text) = items()[row]
    _, _, parts = loaded(kind)
    text = f"Context: {record.context}\n{record.instruction}" if has_text else record.instruction
    if kind.startswith("paligemma"):
        return text
    file = tiny_models.session(kind) / "chat_template.jinja"
    if file.is_file():
        content = [{"type": "image"}, {"type": "text", "text": text}]
        told: str = parts.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=file.read_text(), tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        return told.removeprefix(parts.tokenizer.bos_token or "") if parts.dialogue.bos else told
    pieces = parts.dialogue.prompt(loaded(kind)[0].image_token, None, text)
    return "".join(piece for piece, _ in pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", range(4))
def test_token_ids_are_the_stock_processor_s(kind: str, row: int) -> None:
    record, _ = items()[row]
    made, (_, _, parts) = stock(kind), loaded(kind)
    ours = batch(kind, [items()[row]], generation=True)
    assert record.image is not None
    picture = load_image(record.image, record)
    given = made(images=[picture], text=[asked(kind, row)], return_tensors="pt", add_special_tokens=False)
    ids = given["input_ids"][0].tolist()
    expected = [parts.tokenizer.bos_token_id, *ids] if parts.dialogue.bos else ids
    assert ours.inputs["input_ids"][0].tolist() == expected
    pixels = given["pixel_values"]
    assert torch.equal(ours.inputs["pixel_values"].flatten(), torch.as_tensor(pixels).flatten())


# ---- templates ----------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}BODY{% endfor %}<|im_end|>\n"
)
BODY = "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"


def test_a_template_s_end_is_its_special_token_or_the_tokenizer_s() -> None:
    """Vicuna's and Mistral's templates write none that is one: `</s>` is what the tokenizer ends with."""
    _, _, parts = loaded("llava_next")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% for c in m.content %}BODY{% endfor %} [/INST]{% else %} {{ m.content[0].text }}<\\s>"
        "{% endif %}{% endfor %}"
    ).replace("BODY", BODY)
    found = from_template(parts.tokenizer, template, ("<image>",))
    assert (found.head, found.turn, found.lead, found.end) == ("[INST] ", " [/INST]", " ", "</s>")
    assert found.bos and found.image_tail == ""


def test_thinking_is_off() -> None:
    """As Qwen3.5's template has it: an empty thought stands before the answer, which training must see."""
    _, _, parts = loaded("qwen3_vl")
    template = (CHATML + "{% endfor %}").replace("BODY", BODY.replace("<image>", "<|image_pad|>"))
    template += (
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    found = from_template(parts.tokenizer, template, ("<|image_pad|>",))
    assert found.turn == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert (found.lead, found.end) == ("", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no pictures') }}", "no pictures"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "QUESTIONMARK 0 times"),
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "writes no picture"),
    ],
)
def test_a_template_that_cannot_be_cut_is_told(template: str, told: str) -> None:
    _, _, parts = loaded("internvl")
    with pytest.raises(DeloError, match=told):
        from_template(parts.tokenizer, template, ("<image>",))


def test_an_end_that_is_no_single_token_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models.session("llava"), folder)
    backbone, path = find_backbone(folder)
    assert backbone.load_processor(path).dialogue.end == "</s>"
    chatml = (
        CHATML + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).replace("BODY", BODY)
    (folder / "chat_template.jinja").write_text(chatml)
    found = backbone.load_processor(path)
    assert found.dialogue.end == "</s>", "a made-up mark is no token: the tokenizer's own end is"
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"</s>"', '"<|im_end|>"'))
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("</s>", "<end>"))
    with pytest.raises(DeloError, match=r"(?s)does not have.*</s>"):
        backbone.load_processor(path)


def test_an_image_token_that_the_configuration_does_not_mean_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models.session("llava"), folder)
    backbone, path = find_backbone(folder)
    config = folder / "config.json"
    known = backbone.load_processor(path).config.image_token_id
    config.write_text(config.read_text().replace(f'"image_token_index": {known}', '"image_token_index": 7'))
    with pytest.raises(DeloError, match="disagree on the image token"):
        backbone.load_processor(path)


# ---- attention ----------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_families_with_masks_both_ways_refuse_flash_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    backbone: Any = load_plugin("backbone", name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    cuda = torch.device("cuda")
    assert attention_choices("auto", cuda, torch.bfloat16, backbone.attention) == ("sdpa", "eager")
    with pytest.raises(DeloError, match="do not work with this attention"):
        attention_choices("flash_attention_2", cuda, torch.bfloat16, backbone.attention)


@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
def test_token_types_change_what_is_said(kind: str) -> None:
    """Without them nothing fails, and the numbers are wrong."""
    _, model, _ = loaded(kind)
    inputs = batch(kind, items()[:1], generation=True).inputs
    with torch.no_grad():
        right = model(**inputs).logits
        wrong = model(**inputs | {"token_type_ids": 1 - inputs["token_type_ids"]}).logits
    assert (right - wrong).abs().max() > 1e-2


def test_an_end_that_is_a_word_is_refused() -> None:
    """One token, but an ordinary one: it would end answers in their midst and stand in every prediction."""
    _, _, parts = loaded("qwen3_vl")
    assert len(parts.tokenizer("a").input_ids) == 1
    with pytest.raises(DeloError, match="does not have"):
        require_end_token(replace(parts.dialogue, end="a"), parts.tokenizer)
    require_end_token(parts.dialogue, parts.tokenizer)
