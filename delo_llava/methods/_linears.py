"""Some of a family's language linears: papers place adapters in attention, in its q, k, v, or in MLPs."""

import re
from typing import Literal

from delo_llava.backbones.base import Backbone
from delo_llava.errors import DeloError

Linears = Literal["all", "attention", "qkv", "mlp"]

#: Which linears -> what the name of one must hold besides the family's own pattern.
NARROWER: dict[str, str] = {
    "all": "",
    "attention": r"(?=.*\.(?:self_attn|self_attention|attention|attn)\.[^.]+$)",
    "qkv": r"(?=.*\.(?:[qkv]|qkv)_proj$)",
    "mlp": r"(?=.*\.(?:mlp|feed_forward)\.[^.]+$)",
}


def narrowed(pattern: str, linears: Linears) -> str:
    """A family's full-match regex of language linears, for some of them only."""
    return f"{NARROWER[linears]}(?:{pattern})" if NARROWER[linears] else pattern


def placed(
    adapted: dict[str, tuple[int, int]], backbone: Backbone, linears: Linears, projector: bool
) -> dict[str, tuple[int, int]]:
    """Those of a base's adapted linears that have adapters.

    Args:
        adapted: name -> (in, out), language and projector.
        projector: whether the projector's are among them.

    Raises:
        DeloError: this family has no language linears of that kind.
    """
    pattern = narrowed(backbone.language_pattern, linears)
    language = {n: w for n, w in adapted.items() if re.fullmatch(pattern, n)}
    if not language:
        raise DeloError(
            "This family has no language linears of this kind", given=f"linears={linears}",
            allowed=list(adapted)[:8], fix="set linears to all",
        )  # fmt: skip
    ends = {n: w for n, w in adapted.items() if re.fullmatch(backbone.projector_pattern, n)}
    return language | (ends if projector else {})
