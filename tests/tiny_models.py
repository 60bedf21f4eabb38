"""Tiny random LLaVA, Qwen2-VL and Qwen2.5-VL folders (config, weights, tokenizer, image processor) for tests.

Every width is a multiple of 64, so that NF4 blocks fill; each model has less than a million parameters, built
in under two seconds. Weights are drawn from a seed, so two builds are bit-equal. The folders load through
`delo_llava.backbones` like real ones.
"""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

WORDS = """USER: ASSISTANT: Context: the a red blue green circle square triangle what is shown which color
colour shape answer with letter yes no hint look at picture it comes after before one two three four five six
seven eight nine zero card says mango animal food travel capital of lies in africa asia europe You are helpful
assistant. system user assistant is there an object here name"""
CORPUS = [
    WORDS,
    WORDS.lower(),
    "A. B. C. D. ? ! , : ; ' \" ( ) - 0 1 2 3 4 5 6 7 8 9",
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
]
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CLIP_STATS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def tiny_llava(folder: Path) -> Path:
    """Save a LLaVA (CLIP ViT 64 px / 16: 16 image tokens; 2 Llama layers of width 64) and return `folder`."""
    tokenizer = llama_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=16, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1,
            **_special_ids(tokenizer),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
        vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    save_model(LlavaForConditionalGeneration, config, folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    image = {"image_processor_type": "CLIPImageProcessor", **size, **CLIP_STATS}
    tokens = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _save_processor(folder, "LlavaProcessor", image, {"image_token": "<image>", **tokens})
    return folder


def tiny_qwen2_vl(folder: Path) -> Path:
    """Save a Qwen2-VL (width 128, GQA with one key/value head of 64, 2 + 2 layers) and return `folder`."""
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 128,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    return _tiny_qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, "Qwen2VLProcessor", vision)


def tiny_qwen2_5_vl(folder: Path) -> Path:
    """Save a Qwen2.5-VL (as `tiny_qwen2_vl`; the tower begins with window attention), return `folder`."""
    vision = {
        "depth": 2, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128, "num_heads": 2,
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _tiny_qwen(
        folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor", vision
    )


BUILDERS = {"llava": tiny_llava, "qwen2_vl": tiny_qwen2_vl, "qwen2_5_vl": tiny_qwen2_5_vl}


@cache
def session(kind: str) -> Path:
    """The folder of `kind` (a key of `BUILDERS`, here or in `tiny_families`), built once per test process.
    Treat it as read-only.
    """
    import tiny_families  # which builds on this module

    builder = (BUILDERS | tiny_families.BUILDERS)[kind]
    return builder(Path(mkdtemp(prefix=f"tiny_{kind}_")))


def tiny_clip(folder: Path) -> Path:
    """Save a CLIP (32 px, a joint space of 48, 24 text tokens) and return `folder`."""
    tokenizer = llama_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 24, **_special_ids(tokenizer),
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    image = {"image_processor_type": "CLIPImageProcessor", **size, **CLIP_STATS}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


@cache
def session_clip() -> Path:
    """The folder of the CLIP, built once per test process. Treat it as read-only."""
    return tiny_clip(Path(mkdtemp(prefix="tiny_clip_")))


def _tiny_qwen(
    folder: Path, config_class: Any, model_class: Any, processor: str, vision: dict[str, Any]
) -> Path:
    tokenizer = _qwen_tokenizer()
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")
    }
    ids |= {
        f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>")
        for end in ("start", "end")
    }
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
        **_special_ids(tokenizer),
    }  # fmt: skip
    save_model(model_class, config_class(text_config=text, vision_config=vision, **ids), folder)
    tokenizer.save_pretrained(folder)
    size = {
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 9 * 28 * 28},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    _save_processor(
        folder, processor, {"image_processor_type": "Qwen2VLImageProcessor", **size, **CLIP_STATS}, None
    )
    return folder


def save_model(model_class: Any, config: Any, folder: Path) -> None:
    """Random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.05)
            if name.endswith("mm_input_projection_weight"):  # Gemma 3's, which is made of zeros
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.pad_token_id = config.get_text_config().pad_token_id
    model.save_pretrained(folder)


def _save_processor(folder: Path, name: str, image: dict[str, Any], extra: dict[str, Any] | None) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": name}))
    if extra is not None:
        (folder / "processor_config.json").write_text(json.dumps({**extra, "processor_class": name}))


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def llama_tokenizer() -> LlamaTokenizer:
    """A sentencepiece-like BPE."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    )
    state = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = LlamaTokenizer(vocab=state["vocab"], merges=merges, add_bos_token=True, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def _qwen_tokenizer() -> Qwen2Tokenizer:
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIALS)})
    return tokenizer
