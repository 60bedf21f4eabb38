"""Folding adapters into the weights that they stand beside: W ← W + Σ s·B A, rounded once."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer, summed
from delo_llava.errors import DeloError


def adapter_updates(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What the active adapters of a PEFT model add to each wrapped linear's weight, one after the other.

    Yields:
        the linear's name in the frozen model, and Σ s·B A of shape d_out×d_in, float64.

    Raises:
        DeloError: a layer adds what is no fixed matrix, or is of another kind than LoRA or low-rank pairs.
    """
    for name, layer in _wrapped(model):
        if isinstance(layer, LowRankLayer) and layer.carrier.mix in (None, summed):
            pairs = [(*layer.pair(active), layer.scale[active]) for active in layer.active_adapters]
        elif isinstance(layer, LoraLayer) and not layer.lora_variant:
            a: Any = layer.lora_A
            b: Any = layer.lora_B
            pairs = [(a[n].weight, b[n].weight, layer.scaling[n]) for n in layer.active_adapters]
        else:
            raise DeloError(
                "An adapter does not add a fixed matrix to its weights, so it cannot be merged.",
                given=f"{name}: {type(layer).__name__}",
                fix="evaluate the adapters beside their base",
            )
        with torch.no_grad():
            parts = [scale * (up.double() @ down.double()) for down, up, scale in pairs]
        yield name, torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def fold(linear: nn.Linear, update: Tensor, dtype: torch.dtype) -> float:
    """Add `update` (d_out×d_in, float64) to a plain linear's weight, rounding once, to `dtype`.

    Returns:
        ‖what rounding changed‖ / ‖update‖: how exact the merged weight is; 0 where nothing is added.

    Raises:
        DeloError: a weight of the result is not finite.
    """
    exact = linear.weight.detach().double() + update.to(linear.weight.device)
    merged = exact.to(dtype)
    if not bool(merged.isfinite().all()):
        raise DeloError(
            "A merged weight is not finite.",
            given=str(dtype).removeprefix("torch."),
            fix="use --dtype=bfloat16",
        )
    linear.weight = nn.Parameter(merged, requires_grad=False)
    size = float(update.norm())
    return float((merged.double() - exact).norm()) / size if size else 0.0


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT model, with its own plain linears in their places."""
    for name, layer in list(_wrapped(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_base_model().get_submodule(parent), child, layer.get_base_layer())
    return model.get_base_model()


def _wrapped(model: Any) -> Iterator[tuple[str, Any]]:
    """Every wrapped linear by its name in the frozen model."""
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer
