"""mini-qwen: Qwen2.5-VL's tower of 8-pixel patches, its 2x2 merger as projector, Qwen2 language layers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    LlamaTokenizer,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    rotate_half,
)
from transformers.vision_utils import get_vision_position_ids

from delo_llava.backbones._qwen import SYSTEM
from delo_llava.backbones.qwen2_5_vl import BACKBONE
from tools.mini_base.pretrain import tokenizer_bytes
from tools.mini_base.pretrain.family import (
    HEADS,
    INTERMEDIATE,
    LAYERS,
    TOKENS,
    WIDTH,
    Family,
    Tongue,
    pixel_values,
)
from tools.mini_base.pretrain.talk import Talk

SEEN, DEPTH, SEEN_HEADS, SEEN_INTERMEDIATE = 64, 5, 2, 256
"""Of the tower."""
PATCH, MERGE, FRAMES = 8, 2, 2
SIDE = 64 // PATCH
ROW = SIDE // MERGE
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    + SYSTEM
    + "{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class QwenTongue(Tongue):
    """ChatML; an answer begins a line, so its first piece is the twin of what contexts have."""

    image, space, newline = "<|image_pad|>", tokenizer_bytes.SPACE, tokenizer_bytes.NEWLINE
    backbone = BACKBONE

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        pairs = ((self.vocabulary.get(self.space + p), i) for p, i in self.vocabulary.items())
        self.twins: dict[int, int] = {spaced: bare for spaced, bare in pairs if spaced is not None}

    @property
    def opening(self) -> list[int]:
        """Nothing: Qwen has no BOS."""
        return []

    @property
    def plain(self) -> tuple[int, int]:
        """After the bytes, before the special tokens."""
        return 256, self.vocabulary["<|endoftext|>"]

    @property
    def links(self) -> list[tuple[list[int], bool]]:
        """Nothing, or what stands before an answer; there its first piece has no space."""
        asked = self.pieces(["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"])
        return [([], False), ([], False), (asked, True), (self.pieces(["?"]) + asked, True)]

    def begun(self, piece: int) -> int:
        """The piece without its space."""
        return self.twins[piece]

    def prompt(self, talk: Talk, turn: int, picture: bool) -> str:
        """Later turns follow a line's end and repeat no system text."""
        text = super().prompt(talk, turn, picture)
        return "\n" + text.removeprefix(SYSTEM) if turn else text


class QwenFamily(Family):
    """A stock `Qwen2_5_VLForConditionalGeneration`.

    The tower's heads read the four patches of a cell side by side behind the merger's own RMSNorm: that is
    what the merger's first linear reads, so the BatchNorm folds into it exactly as into LLaVA's projector.
    """

    folder, seen_width = "mini_qwen", SEEN * MERGE**2

    def train_tokenizer(self, lines: Iterable[str], size: int, folder: Path) -> None:
        """A byte-level BPE (`tokenizer_bytes`)."""
        tokenizer_bytes.train(lines, size, folder)

    def load_tokenizer(self, folder: Path) -> QwenTongue:
        """The stock `Qwen2Tokenizer`."""
        return QwenTongue(tokenizer_bytes.load(folder))

    def text_config(self, tongue: Tongue) -> dict[str, Any]:
        """128 wide, 4 layers, 4 heads, tied embeddings, as mini-llava's."""
        return {
            "vocab_size": len(tongue),
            "hidden_size": WIDTH,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 2048,
            "initializer_range": 0.05,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tongue.tokenizer.eos_token_id,
            "pad_token_id": tongue.tokenizer.pad_token_id,
        }

    def new_language(self, tongue: Tongue) -> Any:
        """A Qwen2; a piece and its twin start alike but for one shift that all twins share."""
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        model = Qwen2ForCausalLM(Qwen2Config(**self.text_config(tongue), rope_parameters=rope))
        model.config.use_cache = False
        self._begin_twins(model.model.embed_tokens.weight, tongue)
        return model

    def _begin_twins(self, table: Tensor, tongue: Tongue) -> None:
        assert isinstance(tongue, QwenTongue)
        spaced, bare = (torch.tensor(ids) for ids in zip(*tongue.twins.items(), strict=True))
        with torch.no_grad():
            table[bare] = table[spaced] + torch.randn(table.shape[1]) * table.std()

    def start_from_llava(self, language: Any, tongue: Tongue, folder: Path) -> None:
        """Take mini-llava's layers over; a piece's embedding begins as the mean of its pieces there."""
        old = LlavaForConditionalGeneration.from_pretrained(folder).model.language_model
        words = LlamaTokenizer.from_pretrained(folder, add_bos_token=False)
        state = {k: v for k, v in old.state_dict().items() if k != "embed_tokens.weight"}
        rest = language.model.load_state_dict(state, strict=False)
        assert not rest.unexpected_keys
        assert all(k.endswith("bias") or k == "embed_tokens.weight" for k in rest.missing_keys)
        table, given = language.model.embed_tokens.weight, old.embed_tokens.weight
        same = {"<|im_end|>": "</s>", "<|image_pad|>": "<image>", "<|endoftext|>": "<pad>"}
        known = words.get_vocab()
        with torch.no_grad():
            table.mul_(given.std() / table.std())
            for piece, i in tongue.vocabulary.items():
                text = tongue.tokenizer.convert_tokens_to_string([piece])
                if piece in same:
                    table[i] = given[known[same[piece]]]
                elif piece[:2] != "<|" and "\ufffd" not in text:
                    pieces = words.tokenize(text.strip(" ") if text.strip(" ") else text)
                    table[i] = given[[known[p] for p in pieces]].mean(0)
        self._begin_twins(table, tongue)

    def vision_config(self) -> Qwen2_5_VLVisionConfig:
        """Patches of 8 pixels, merged two by two; one window is one picture, so all attention is full."""
        return Qwen2_5_VLVisionConfig(
            depth=DEPTH,
            hidden_size=SEEN,
            out_hidden_size=WIDTH,
            intermediate_size=SEEN_INTERMEDIATE,
            num_heads=SEEN_HEADS,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_patch_size=FRAMES,
            window_size=64,
            fullatt_block_indexes=list(range(DEPTH)),
        )

    def new_vision(self) -> nn.Module:
        """Qwen2.5-VL's vision transformer with its merger."""
        model: nn.Module = Qwen2_5_VisionTransformerPretrainedModel._from_config(self.vision_config())
        return model

    def see(self, vision: nn.Module, pixels: NDArray[np.uint8]) -> Tensor:
        """The stock forward up to the merger's linears, for pictures of one size all at once (stock attends
        picture by picture, which is slow for small ones).
        """
        tower: Any = vision
        cos, sin = (t.detach() for t in self._rotation(tower))
        seen = pixel_values(pixels).unflatten(3, (ROW, MERGE, PATCH)).unflatten(2, (ROW, MERGE, PATCH))
        # batch, colour, rows, row in cell, y, columns, column in cell, x -> cell by cell, patch by patch
        patches = seen.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)
        weight = tower.patch_embed.proj.weight.sum(2).flatten(1)  # both frames are the picture
        state = nn.functional.linear(patches, weight)
        for block in tower.blocks:
            qkv = block.attn.qkv(block.norm1(state)).unflatten(2, (3, SEEN_HEADS, -1)).permute(2, 0, 3, 1, 4)
            query, key = (t * cos + rotate_half(t) * sin for t in qkv[:2])
            mixed = nn.functional.scaled_dot_product_attention(query, key, qkv[2])
            state = state + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            state = state + block.mlp(block.norm2(state))
        features: Tensor = tower.merger.ln_q(state)
        return features.reshape(len(pixels), TOKENS, self.seen_width)

    @staticmethod
    def _rotation(tower: Any) -> tuple[Tensor, Tensor]:
        places = get_vision_position_ids(torch.tensor([[1, SIDE, SIDE]]), MERGE)
        cos, sin = tower.rotary_pos_emb(torch.zeros(1), places)
        return cos, sin

    def join(self, vision: nn.Module, language: Any, tongue: Tongue) -> Any:
        """Multimodal rotary positions; those of text are the language model's own."""
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids: dict[str, Any] = {name: tongue.vocabulary[_piece(name)] for name in names}
        config = Qwen2_5_VLConfig(
            text_config=self.text_config(tongue) | {"rope_parameters": rope},
            vision_config=self.vision_config().to_dict(),
            tie_word_embeddings=True,
            **ids,
        )
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        model.model.visual.load_state_dict(vision.state_dict())
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.tie_weights()
        model.model.visual.requires_grad_(False)
        model.model.visual.merger.mlp.requires_grad_(True)
        model.config.text_config.use_cache = False
        return model

    def projector(self, model: Any) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        """The merger's."""
        first, act, second = model.model.visual.merger.mlp
        return first, act, second

    def positions(self, images: Tensor) -> Tensor | None:
        """A picture's tokens stand at one time in 4 rows and columns; text goes on behind the largest."""
        count = images.cumsum(1)
        text = torch.arange(images.shape[1]) - (count == TOKENS) * (TOKENS - ROW)
        begin, place = images.int().argmax(1, keepdim=True), count - 1
        parts = (begin.expand_as(text), begin + place // ROW, begin + place % ROW)
        return torch.stack([torch.where(images, part, text) for part in parts])

    def save(self, model: Any, tongue: Tongue, words: Path, folder: Path) -> None:
        """Model, tokenizer with its chat template, and image processor."""
        model.config.text_config.use_cache = True
        model.save_pretrained(folder)
        tongue.tokenizer.chat_template = TEMPLATE
        tongue.tokenizer.save_pretrained(folder)
        image_processor().save_pretrained(folder)
        path = folder / "preprocessor_config.json"
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _piece(name: str) -> str:
    """`image_token_id` -> `<|image_pad|>`, `vision_start_token_id` -> `<|vision_start|>`."""
    word = name.removesuffix("_token_id")
    return f"<|{word}|>" if "_" in word else f"<|{word}_pad|>"


def image_processor() -> Qwen2VLImageProcessorPil:
    """About 64x64 pixels whatever the picture, values from -1 to 1."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
        patch_size=PATCH,
        temporal_patch_size=FRAMES,
        merge_size=MERGE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


FAMILY = QwenFamily()
