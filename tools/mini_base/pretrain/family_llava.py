"""mini-llava: CLIP tower, two-linear projector, Llama, sentencepiece."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from delo_llava.backbones.llava import BACKBONE
from tools.mini_base.pretrain import tokenizer
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

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %} {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
)


class LlavaTongue(Tongue):
    """BOS before a text; answers follow a space, so they are the pieces that contexts have."""

    image, space, newline = "<image>", tokenizer.MARK, "<0x0A>"
    backbone = BACKBONE

    @property
    def opening(self) -> list[int]:
        """BOS."""
        return [1]

    @property
    def plain(self) -> tuple[int, int]:
        """After the control pieces and the bytes, before `<pad>` and `<image>`."""
        return 259, len(self) - 2

    @property
    def links(self) -> list[tuple[list[int], bool]]:
        """Nothing, or what stands before an answer."""
        asked = self.pieces([" ", "ASSISTANT:"])
        return [([], False), ([], False), (asked, False), (self.pieces(["?"]) + asked, False)]


class LlavaFamily(Family):
    """A stock `LlavaForConditionalGeneration`."""

    folder, seen_width = "mini_llava", WIDTH

    def train_tokenizer(self, lines: Iterable[str], size: int, folder: Path) -> None:
        """A sentencepiece model (`tokenizer`)."""
        tokenizer.train(lines, size, folder)

    def load_tokenizer(self, folder: Path) -> Tongue:
        """The stock `LlamaTokenizer`."""
        return LlavaTongue(tokenizer.load(folder))

    def text_config(self, tongue: Tongue) -> LlamaConfig:
        """128 wide, 4 layers, 4 heads, tied embeddings."""
        return LlamaConfig(
            vocab_size=len(tongue),
            hidden_size=WIDTH,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=512,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=len(tongue) - 2,
        )

    def new_language(self, tongue: Tongue) -> Any:
        """A Llama."""
        model = LlamaForCausalLM(self.text_config(tongue))
        model.config.use_cache = False
        return model

    def vision_config(self) -> CLIPVisionConfig:
        """128 wide, 4 layers, 4 heads, 64 pixels in patches of 16: 16 tokens and the class token."""
        return CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            projection_dim=WIDTH,
        )

    def new_vision(self) -> nn.Module:
        """A CLIP vision model."""
        return CLIPVisionModel(self.vision_config())

    def see(self, vision: nn.Module, pixels: NDArray[np.uint8]) -> Tensor:
        """The last layer's patch tokens, as LLaVA selects them."""
        states: Tensor = vision(pixel_values(pixels), output_hidden_states=True).hidden_states[-1]
        return states[:, 1:]

    def join(self, vision: nn.Module, language: Any, tongue: Tongue) -> Any:
        """Last layer's patch tokens, no class token, GELU projector."""
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=self.vision_config(),
                text_config=self.text_config(tongue),
                image_token_index=tongue.image_id,
                image_seq_length=TOKENS,
                vision_feature_layer=-1,
                vision_feature_select_strategy="default",
                projector_hidden_act="gelu",
                tie_word_embeddings=True,
            )
        )
        model.model.vision_tower.load_state_dict(vision.state_dict())
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.tie_weights()
        model.model.vision_tower.requires_grad_(False)
        model.config.use_cache = False
        return model

    def projector(self, model: Any) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        """LLaVA's own."""
        parts = model.model.multi_modal_projector
        return parts.linear_1, parts.act, parts.linear_2

    def save(self, model: Any, tongue: Tongue, words: Path, folder: Path) -> None:
        """Model, processor with its chat template, and the sentencepiece model itself."""
        model.config.use_cache = True
        model.generation_config.use_cache = True
        model.save_pretrained(folder)
        LlavaProcessor(
            image_processor(),
            tongue.tokenizer,
            patch_size=16,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        ).save_pretrained(folder)
        image_processor().save_pretrained(folder)
        shutil.copyfile(words / "tokenizer.model", folder / "tokenizer.model")
        path = folder / "tokenizer_config.json"
        facts = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": True}
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def image_processor() -> CLIPImageProcessorPil:
    """64 pixels, values from -1 to 1."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


FAMILY = LlavaFamily()
