"""4-bit NF4 bases: how they are asked for, proof of what was quantised, and the way back to plain linears."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from delo_llava.errors import DeloError


def nf4_config(compute_dtype: torch.dtype, unquantised: Sequence[str]) -> Any:
    """Transformers' configuration for NF4 with double quantisation.

    Args:
        compute_dtype: format of the matrix products.
        unquantised: whole module paths that stay as they are (see `Backbone.unquantised`).

    Raises:
        DeloError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise DeloError(
            "A 4-bit base needs bitsandbytes.", fix="pip install bitsandbytes, or use --quant=none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(unquantised),
    )


def quantised_linears(model: nn.Module) -> dict[str, Any]:
    """Name -> module of every 4-bit linear."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def check_quantised(model: nn.Module, pattern: str) -> None:
    """Make sure that exactly the linears whose names fully match `pattern` are 4-bit.

    Raises:
        DeloError: naming a linear that is 4-bit and should not be, or the other way round.
    """
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)}
    wrong = sorted(wanted ^ quantised_linears(model).keys())
    if wrong:
        raise DeloError(
            f"{len(wrong)} linears are quantised that should not be, or the reverse.",
            given=wrong[0],
            allowed=[pattern],
        )


def keep_exact_on_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes' AVX512-BF16 inference path off.

    On CPUs that have the instructions, a 4-bit linear in evaluation mode, given an input without gradient,
    repacks its weight for good, rounds to bf16 from then on, and passes no gradient any more, not even in
    later training.
    """
    for module in quantised_linears(model).values():
        module.support_avx512bf16_for_cpu = False


def dense_weight(linear: Any) -> torch.Tensor:
    """The weight of a linear, d_out×d_in; of a 4-bit one, a dequantised copy."""
    if getattr(linear.weight, "quant_state", None) is None:
        plain: torch.Tensor = linear.weight.data
        return plain
    import bitsandbytes.functional as bnb

    exact: torch.Tensor = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return exact


def dequantise_(model: nn.Module) -> int:
    """Replace, in place, every 4-bit linear by an `nn.Linear` that holds the dequantised weight.

    The result computes the same function (up to rounding of the products), serves as its reference, and is
    saved as a plain model.

    Returns:
        how many were replaced.
    """
    found = quantised_linears(model)
    for name, module in found.items():
        weight = dense_weight(module)
        weight = weight.to(module.compute_dtype or weight.dtype)
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.data.to(weight.dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(module.training))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return len(found)


def round_trip_error(device: str) -> float:
    """Relative error ‖w − w'‖/‖w‖ of NF4 on a fixed normal matrix: shows that 4 bit works on `device`."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    back = bnb.dequantize_4bit(packed, state)
    return float((weight - back).norm() / weight.norm())
