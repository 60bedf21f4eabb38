"""Prompts as prefix keys and values: what every token of a row may attend to besides the sequence.

They are put before the keys and values that a layer has (its cache included) when attention is computed, so
no token moves: position ids, rotary embeddings (M-RoPE too), caches and beams stay as they are, and prompts
    carry no
position of their own. A prefix belongs to a row and is kept for all decode steps of a `generate`.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from delo_llava.adapters.carrier import Carrier
from delo_llava.errors import DeloError

#: Put before the name of an attention implementation.
NAME = "delo_prefix_"
SUPPORTED = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class PrefixShape:
    """What a prefix of one layer looks like: `heads` key/value heads of width `width`."""

    layers: int
    heads: int
    width: int


@dataclass(frozen=True)
class PrefixPlan:
    """The prefixes of a forward's rows.

    Attributes:
        keys, values: layer -> R×heads×length×width; a layer that is not named has no prefix.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    @property
    def rows(self) -> int:
        """Number of rows, beams included."""
        return len(next(iter(self.keys.values())))

    def index_select(self, rows: Tensor) -> "PrefixPlan":
        """The prefixes of some rows in a new order."""
        keys, values = (
            {layer: tensor.index_select(0, rows) for layer, tensor in tensors.items()}
            for tensors in (self.keys, self.values)
        )
        return PrefixPlan(keys, values)


def prefix_shape(model: Any) -> PrefixShape:
    """The shape of prefixes for the language model of a transformers model."""
    text = model.config.get_text_config()
    heads = text.num_key_value_heads or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return PrefixShape(len(model.get_decoder().layers), heads, width)


def attach_prefixes(model: Any, carrier: Carrier) -> None:
    """Let every self-attention of the language model read its prefix from the carrier's decision, a
    `PrefixPlan`.

    Raises:
        DeloError: the model's attention implementation is none that prefixes are known to work with.
    """
    text = model.config.get_text_config()
    own = text._attn_implementation.removeprefix(NAME)
    if own not in SUPPORTED:
        raise DeloError(
            "Prompts do not work with this attention", given=own, allowed=SUPPORTED, fix="use --attn=sdpa"
        )
    AttentionInterface.register(NAME + own, _prefixed)
    AttentionMaskInterface.register(NAME + own, ALL_MASK_ATTENTION_FUNCTIONS[own])
    text._attn_implementation = NAME + own
    for index, layer in enumerate(model.get_decoder().layers):
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            attention.__dict__["prefix"] = (carrier, index, own)


def _prefixed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    """transformers' attention interface: the module's own attention over prefix and sequence."""
    carrier, layer, own = module.__dict__["prefix"]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(own, _eager(module))
    plan = carrier.current() if carrier.enabled() and carrier.stack else None
    if plan is None or layer not in plan.keys:
        return attend(module, query, key, value, attention_mask, **options)
    length = plan.keys[layer].shape[2]
    mask = attention_mask
    if own != "flash_attention_2" or mask is not None:  # flash aligns a causal mask at the end of the keys
        mask = _widened(mask, query, key, length)
    key, value = (
        torch.cat([prefix[layer].to(own_part.dtype), own_part], dim=2)
        for prefix, own_part in ((plan.keys, key), (plan.values, value))
    )
    return attend(module, query, key, value, mask, **options)


def _eager(module: nn.Module) -> Any:
    """The family's own plain attention, which it keeps beside its attention class."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _widened(mask: Tensor | None, query: Tensor, key: Tensor, length: int) -> Tensor | None:
    """A mask with `length` more keys in front, which everything may attend to.

    None stands for a causal mask over the whole sequence, or for a single query that sees all keys.
    """
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        if queries == 1:
            return None
        seen = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril(keys - queries)
        mask = seen[None, None]
    shape = (*mask.shape[:-1], length)
    front = mask.new_ones(shape) if mask.dtype == torch.bool or mask.dim() == 2 else mask.new_zeros(shape)
    return torch.cat([front, mask], dim=-1)
