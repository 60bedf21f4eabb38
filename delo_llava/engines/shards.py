"""An optimiser's state as whole tensors, whatever engine holds it in which parts.

ZeRO keeps the state of this rank's share in flat tensors. A `Piece` says which part of which parameter lies
where; from pieces the whole state is gathered (so a checkpoint serves any number of ranks) and dealt out
again.
(DeepSpeed's `safe_get_full_optimizer_state` does it only for stage 3, and there its counterpart for setting
fails for shapes that the ranks do not divide evenly; a state that was never stepped it cannot set at all.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.errors import DeloError

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """`flat[at : at + length]` is this rank's part of a parameter, its elements from `start` on.

    Attributes:
        flat: the tensor under which the optimiser keeps state (for an unsharded one the parameter itself).
    """

    flat: Tensor
    at: int
    start: int
    length: int


@dataclass
class OptimizerState:
    """Attributes:
    tensors: "<key>/<parameter name>" -> whole tensor of the parameter's shape (empty but on the first rank).
    scalars: key -> (value, name of its dtype, or None for a plain number), equal for all parameters.
    groups: the step count of each parameter group, of optimisers that keep it there (DeepSpeed's FusedAdam).
    """

    tensors: dict[str, Tensor]
    scalars: dict[str, tuple[float, str | None]]
    groups: list[int | None]


def whole_pieces(parameters: Iterable[nn.Parameter]) -> dict[int, Piece]:
    """For an optimiser over the parameters themselves: id of the parameter -> piece."""
    return {id(p): Piece(p, 0, 0, p.numel()) for p in parameters}


def zero12_pieces(optimizer: Any) -> dict[int, Piece]:
    """For DeepSpeed's ZeRO 1 and 2, with or without offload."""
    pieces: dict[int, Piece] = {}
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                place, part = mapping.hp_fragment_address, mapping.lp_fragment_address
                pieces[id(parameter)] = Piece(flat, place.start, part.start, part.numel)
    return pieces


def zero3_pieces(optimizer: Any, parameters: Iterable[nn.Parameter], rank: int) -> dict[int, Piece]:
    """For DeepSpeed's ZeRO 3; what pads the last rank's share is left out."""
    pieces: dict[int, Piece] = {}
    for parameter in parameters:
        group, at, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        length = min(share, numel_of(parameter) - rank * share)
        if length > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            pieces[id(parameter)] = Piece(flat, at, rank * share, length)
    return pieces


def gather_state(
    optimizer: Any, pieces: dict[int, Piece], named: dict[str, nn.Parameter], reduce: Reduce, keep: bool
) -> OptimizerState:
    """The whole state of `named` parameters; every rank must call it.

    Args:
        optimizer: the inner torch optimiser.
        reduce: sums a tensor over ranks.
        keep: return tensors (first rank) or only take part.
    """
    states = [state for state in optimizer.state.values() if state]
    keys = sorted({k for state in states for k, v in state.items() if _is_tensor(v)})
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        piece = pieces.get(id(parameter))
        for key in keys:
            # Summed as integers: bits of one rank and zeros of the others add up to these very bits.
            bits = torch.zeros(numel_of(parameter), dtype=torch.int32, device=parameter.device)
            if piece is not None:
                part = optimizer.state[piece.flat][key].flatten()[piece.at : piece.at + piece.length]
                bits[piece.start : piece.start + piece.length] = part.to(bits.device).view(torch.int32)
            summed = reduce(bits)
            if keep:
                tensors[f"{key}/{name}"] = summed.view(torch.float32).reshape(shape_of(parameter)).cpu()
    groups = [group.get("step") for group in optimizer.param_groups]
    return OptimizerState(tensors, _scalars(states) if keep else {}, groups)


def deal_state(
    optimizer: Any, pieces: dict[int, Piece], named: dict[str, nn.Parameter], state: OptimizerState
) -> None:
    """Give this rank's optimiser its part of `state`; padding gets zeros, as it has without a break."""
    keys = sorted({name.partition("/")[0] for name in state.tensors})
    for piece in pieces.values():
        if piece.flat not in optimizer.state:
            fresh: dict[str, Any] = {
                key: torch.tensor(value, dtype=getattr(torch, kind)) if kind else value
                for key, (value, kind) in state.scalars.items()
            }
            optimizer.state[piece.flat] = fresh | {key: torch.zeros_like(piece.flat.data) for key in keys}
    for group, step in zip(optimizer.param_groups, state.groups, strict=True):
        if step is not None:
            group["step"] = step
    mine = [(name, pieces[id(p)]) for name, p in named.items() if id(p) in pieces]
    for name, piece in mine:
        for key in keys:
            part = state.tensors[f"{key}/{name}"].flatten()[piece.start : piece.start + piece.length]
            optimizer.state[piece.flat][key].view(-1)[piece.at : piece.at + piece.length].copy_(part)


def _scalars(states: list[dict[str, Any]]) -> dict[str, tuple[float, str | None]]:
    """What is not a tensor per element, such as Adam's step count.

    Raises:
        DeloError: it differs between parameters, which a checkpoint of whole tensors cannot hold.
    """
    found = {
        key: {_number(state[key]) for state in states if key in state and not _is_tensor(state[key])}
        for key in sorted({k for state in states for k in state})
    }
    for key, values in found.items():
        if len(values) > 1:
            raise DeloError(
                "The optimiser counts steps differently for different parameters",
                given=f"{key}: {sorted(map(str, values))}",
                fix="train.save_every=0 leaves step checkpoints out",
            )
    return {key: values.pop() for key, values in found.items() if values}


def _number(value: Any) -> tuple[float, str | None]:
    if torch.is_tensor(value):
        return value.item(), str(value.dtype).removeprefix("torch.")
    return value, None


def _is_tensor(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def numel_of(parameter: Any) -> int:
    """Elements of a parameter, however ZeRO-3 splits it."""
    return int(parameter.ds_numel if hasattr(parameter, "ds_id") else parameter.numel())


def shape_of(parameter: Any) -> torch.Size:
    """Its whole shape."""
    return torch.Size(parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape)
