"""What the planner must know of a picture of 1024×768, without weights and without a picture."""

from dataclasses import dataclass
from typing import Any

#: The picture that is planned with: width and height.
WIDTH, HEIGHT = 1024, 768


@dataclass(frozen=True)
class PlannedImage:
    """A picture of 1024×768 at the family's default limits.

    Attributes:
        tokens: that the language model reads.
        patches: that go through the tower.
        floats: that one patch takes in a layer of the tower, which runs without gradient.
    """

    tokens: int
    patches: int
    floats: int

    def with_tokens(self, tokens: int) -> "PlannedImage":
        """A picture of so many tokens: its patches grow with them."""
        return PlannedImage(tokens, self.patches * tokens // self.tokens, self.floats)


def tower_floats(vision: Any) -> int:
    """Activations of one layer for a patch: norms, queries, keys, values, attention, and the MLP's two."""
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    return 6 * int(width) + 2 * int(inner)


def tile_patches(vision: Any) -> int:
    """Patches of one tile; sides are a number or (height, width)."""
    height, width = _pair(vision.image_size)
    down, right = _pair(vision.patch_size)
    return (height // down) * (width // right)


def _pair(side: Any) -> tuple[int, int]:
    return (int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[1]))
