"""Tiny random folders of the further families, as `tiny_models` has of the first three.

Towers see 64 pixels in patches of 16; language models have two layers. Image processors are real ones with
small limits, so that pictures of different forms have different numbers of tiles. Chat templates are short
ones that write turns as the published checkpoints do.
"""

import json
from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "qwen3_vl": QWEN_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "internvl": QWEN_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n"),
    "llava_onevision": QWEN_TEMPLATE.replace("IMAGE", "<image>\n"),
    "llava_next": (
        "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}"
        "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "smolvlm": (
        "{{ bos_token }}{% for m in messages %}{{ m.role.capitalize() }}"
        "{{ ':' if m.content[0].type == 'image' else ': ' }}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
PINPOINTS = [[64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tiny_qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL whose first layer adds features of the tower's first."""
    return _qwen3(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, {})


def tiny_qwen3_vl_moe(folder: Path) -> Path:
    """The same with four experts, two of which act."""
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": []}
    return _qwen3(folder, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, more)


def _qwen3(folder: Path, config_class: Any, model_class: Any, more: dict[str, Any]) -> Path:
    tokenizer = byte_tokenizer(tiny_models.QWEN_SPECIALS, eos="<|im_end|>", pad="<|endoftext|>")
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = language(tokenizer, None, rope_parameters=rope | {"mrope_interleaved": True}, **more)
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(f"<|{n}_pad|>") for n in ("image", "video")}
    ids |= {
        f"vision_{e}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{e}|>") for e in ("start", "end")
    }
    image = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 9 * 32 * 32}, **HALF,
    }  # fmt: skip
    config = config_class(text_config=text, vision_config=vision, **ids)
    return save(folder, model_class, config, tokenizer, image, "Qwen3VLProcessor", TEMPLATES["qwen3_vl"])


def tiny_internvl(folder: Path) -> Path:
    """InternVL over Qwen2: four tokens a tile, up to four tiles and the whole picture."""
    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokenizer = byte_tokenizer(specials, eos="<|im_end|>", pad="<|endoftext|>")
    config = InternVLConfig(
        vision_config=VISION | {"image_size": [64, 64], "patch_size": [16, 16]},
        text_config=language(tokenizer, "qwen2"), image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tie_word_embeddings=False,
    )  # fmt: skip
    image = {
        "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 64, "width": 64},
        "crop_to_patches": True, "min_patches": 1, "max_patches": 4, **HALF,
    }  # fmt: skip
    model_class = InternVLForConditionalGeneration
    return save(folder, model_class, config, tokenizer, image, "InternVLProcessor", TEMPLATES["internvl"])


def tiny_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT with a CLIP tower over Llama; two to four tiles and the whole picture."""
    tokenizer = tiny_models.llama_tokenizer()
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION}, text_config=language(tokenizer, "llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    image = {
        "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64}, "image_grid_pinpoints": PINPOINTS, **tiny_models.CLIP_STATS,
    }  # fmt: skip
    model_class = LlavaNextForConditionalGeneration
    return save(folder, model_class, config, tokenizer, image, "LlavaNextProcessor", TEMPLATES["llava_next"])


def tiny_llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision with a SigLIP tower over Qwen2; beyond three tiles' tokens the grid is shrunk."""
    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<video>")
    tokenizer = byte_tokenizer(specials, eos="<|im_end|>", pad="<|endoftext|>")
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config=language(tokenizer, "qwen2"), image_grid_pinpoints=[*PINPOINTS, [64, 64], [192, 128]],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_3", tie_word_embeddings=False,
    )  # fmt: skip
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 64, "width": 64},
        "image_grid_pinpoints": config.image_grid_pinpoints, **HALF,
    }  # fmt: skip
    template = TEMPLATES["llava_onevision"]
    model_class = LlavaOnevisionForConditionalGeneration
    return save(folder, model_class, config, tokenizer, image, "LlavaOnevisionProcessor", template)


def tiny_smolvlm(folder: Path) -> Path:
    """SmolVLM over Llama: pictures are enlarged to 128 pixels and cut into tiles of 64, four tokens each."""
    return _smol(folder, SmolVLMConfig, SmolVLMForConditionalGeneration, "SmolVLM", "<|im_start|>")


def tiny_idefics3(folder: Path) -> Path:
    """Idefics3, laid out as SmolVLM."""
    return _smol(folder, Idefics3Config, Idefics3ForConditionalGeneration, "Idefics3", "<|begin_of_text|>")


def _smol(folder: Path, config_class: Any, model_class: Any, name: str, bos: str) -> Path:
    places = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    own = (bos, "<|endoftext|>", "<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")
    tokenizer = byte_tokenizer((*own, *places), eos="<end_of_utterance>", pad="<|endoftext|>", bos=bos)
    config = config_class(
        vision_config=VISION, text_config=language(tokenizer, "llama"), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    image = {
        "image_processor_type": f"{name}ImageProcessor", "do_image_splitting": True,
        "size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}, **HALF,
    }  # fmt: skip
    return save(folder, model_class, config, tokenizer, image, f"{name}Processor", TEMPLATES["smolvlm"])


def tiny_gemma3(folder: Path) -> Path:
    """Gemma 3 with one sliding and one full layer; four tokens a picture."""
    specials = (
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    )
    tokenizer = gemma_tokenizer(specials)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    marks = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    config = Gemma3Config(
        text_config=language(tokenizer, "gemma3_text", **layers), mm_tokens_per_image=4,
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        **{f"{name}_token_index": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )  # fmt: skip
    image = {
        "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 64, "width": 64},
        "do_pan_and_scan": None, **HALF,
    }  # fmt: skip
    model_class = Gemma3ForConditionalGeneration
    return save(folder, model_class, config, tokenizer, image, "Gemma3Processor", TEMPLATES["gemma3"])


def tiny_paligemma(folder: Path, text: str = "gemma") -> Path:
    """PaliGemma: sixteen tokens a picture."""
    tokenizer = gemma_tokenizer(("<image>",))
    config = PaliGemmaConfig(
        text_config=language(tokenizer, text), projection_dim=128, hidden_size=128,
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    image = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64},
        "image_seq_length": 16, **HALF,
    }  # fmt: skip
    return save(folder, PaliGemmaForConditionalGeneration, config, tokenizer, image, "PaliGemmaProcessor")


def tiny_paligemma2(folder: Path) -> Path:
    """PaliGemma 2, whose Gemma 2 has eager attention only."""
    return tiny_paligemma(folder, "gemma2")


def tiny_vipllava(folder: Path) -> Path:
    """ViP-LLaVA, which has no backbone here: docs/extending.md has one. Sixteen tokens a picture."""
    tokenizer = tiny_models.llama_tokenizer()
    config = VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION}, text_config=language(tokenizer, "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=[-1, -2],
        tie_word_embeddings=False,
    )  # fmt: skip
    image = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64}, **tiny_models.CLIP_STATS,
    }  # fmt: skip
    model_class = VipLlavaForConditionalGeneration
    return save(folder, model_class, config, tokenizer, image, "LlavaProcessor")


BUILDERS = {
    "qwen3_vl": tiny_qwen3_vl, "qwen3_vl_moe": tiny_qwen3_vl_moe, "internvl": tiny_internvl,
    "llava_next": tiny_llava_next, "llava_onevision": tiny_llava_onevision, "smolvlm": tiny_smolvlm,
    "idefics3": tiny_idefics3, "gemma3": tiny_gemma3, "paligemma": tiny_paligemma,
    "paligemma2": tiny_paligemma2,
}  # fmt: skip


def language(tokenizer: Any, kind: str | None, **more: Any) -> dict[str, Any]:
    """Two layers of width 128, two heads on one key/value head of 64."""
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        **({} if kind is None else {"model_type": kind}), "vocab_size": len(tokenizer), "hidden_size": 128,
        "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.1, **ids, **more,
    }  # fmt: skip


def save(
    folder: Path, model_class: Any, config: Any, tokenizer: Any, image: dict[str, Any], processor: str,
    template: str | None = None,
) -> Path:  # fmt: skip
    """Write the folder."""
    tiny_models.save_model(model_class, config, folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": processor}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_tokenizer(specials: tuple[str, ...], eos: str, pad: str, bos: str | None = None) -> Any:
    """Byte-level BPE."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(tiny_models.CORPUS, trainer)
    state = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"], merges=merges, eos_token=eos, pad_token=pad, bos_token=bos
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


def gemma_tokenizer(specials: tuple[str, ...]) -> Any:
    """Gemma's BPE; line breaks are no part of its merges, as none were in what it was trained on."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    fixed = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=fixed, show_progress=False)
    raw.train_from_iterator([" ".join(tiny_models.CORPUS).replace("\n", " ")], trainer)
    state = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = GemmaTokenizer(vocab=state["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer
