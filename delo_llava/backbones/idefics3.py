"""Idefics3 (`idefics3`): as SmolVLM, with Llama 3's words and 169 tokens a tile.

Limits: most image processors enlarge small pictures first, so every picture has some 13 tiles.
"""

from delo_llava.backbones.smolvlm import SmolVLM


class Idefics3(SmolVLM):
    """SmolVLM's layout; the tokenizer's BOS is `<|begin_of_text|>`."""

    model_types = ("idefics3",)


BACKBONE = Idefics3()
