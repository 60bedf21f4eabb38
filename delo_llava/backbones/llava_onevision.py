"""LLaVA-OneVision (`llava_onevision`): up to 36 tiles, of which nine tiles' worth of tokens are kept."""

import math
from typing import Any

from delo_llava.backbones._anyres import AnyRes
from delo_llava.backbones._planned import tile_patches
from delo_llava.data.dialogue import chatml


class LlavaOnevision(AnyRes):
    """Beyond `anyres_max_9` the grid is shrunk; image queries are made of it before that."""

    model_types = ("llava_onevision",)
    default_dialogue = chatml("", "", "\n")

    def grid_tokens(self, config: Any, rows: int, columns: int) -> int:
        """The model's own rule: shrunk by the square root of what is too much, if more than a tenth."""
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * tile_patches(config.vision_config)))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return super().grid_tokens(config, rows, columns)


BACKBONE = LlavaOnevision()
