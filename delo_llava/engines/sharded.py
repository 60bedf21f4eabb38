"""Whole trained parameters out of ZeRO's parts, and a plain module out of an engine's.

DeepSpeed's own accessors are not enough: those for setting fail where ranks do not divide a tensor evenly,
and live copies written alone are lost at the next update. So the parts (`shards.Piece`) are read and written
directly, and put together by one exact sum over ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.engines.ranks import Ranks
from delo_llava.engines.shards import Piece, numel_of, shape_of

#: What ZeRO-3 leaves on modules, besides names that begin with `ds_`.
ZERO_ATTRIBUTES = ("_external_params", "_original_parameters")


class ShardedTrained:
    """`Trained` under ZeRO 1, 2 and 3; every rank must make the same calls.

    Args:
        optimizer: DeepSpeed's, around ours.
        parameters: the trained ones by name.
        pieces: id of a parameter -> where this rank's part of its fp32 master copy lies.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        pieces: Mapping[int, Piece],
        ranks: Ranks,
        stage: int,
    ) -> None:
        self._optimizer, self._parameters, self._pieces = optimizer, parameters, pieces
        self._ranks, self._stage = ranks, stage

    def values(self) -> dict[str, Tensor]:
        """Copies: of the live parameters where they are whole, of the master copies under ZeRO-3."""
        if self._stage < 3:
            return {name: p.detach().float().clone() for name, p in self._parameters.items()}
        return self._whole({name: self._master(piece) for name, piece in self._mine()})

    def gradients(self) -> dict[str, Tensor]:
        """Between the last backward pass of a global batch and its update."""
        return self._whole({name: self._gradient(name, piece) for name, piece in self._mine()})

    def add_gradients(self, extra: Mapping[str, Tensor]) -> None:
        """Each rank adds its part."""
        for name, piece in self._mine():
            if name in extra:
                gradient = self._gradient(name, piece)
                gradient.add_(_part(extra[name], piece).to(gradient))
                self._note_norm(name)

    def rewrite(self, new: Mapping[str, Tensor]) -> None:
        """Master copies and what the model computes with; no communication, as `new` is equal on every
        rank.
        """
        with torch.no_grad():
            for name, piece in self._mine():
                if name in new:
                    part = _part(new[name], piece)
                    self._master(piece).copy_(part)
                    if self._stage == 3:
                        parameter: Any = self._parameters[name]
                        parameter.ds_tensor.data.view(-1)[: piece.length].copy_(part)
            for name, value in new.items():
                parameter = self._parameters[name]
                if parameter.data.numel() == numel_of(
                    parameter
                ):  # whole here: always below stage 3, or kept so
                    parameter.data.copy_(value.view_as(parameter.data))

    def reset_moments(self, where: Mapping[str, Tensor]) -> None:
        """Zero this rank's parts of both moments under the masks."""
        inner = self._optimizer.optimizer
        for name, piece in self._mine():
            if name in where:
                mask = _part(where[name], piece)
                for value in inner.state.get(piece.flat, {}).values():
                    if torch.is_tensor(value) and value.dim():
                        kept = value.view(-1)[piece.at : piece.at + piece.length]
                        kept.masked_fill_(mask.to(kept.device), 0.0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks of the engine."""
        return self._ranks.sum(tensor)

    def _mine(self) -> list[tuple[str, Piece]]:
        """Names of the parameters of which this rank holds a part, with the part."""
        return [(n, self._pieces[id(p)]) for n, p in self._parameters.items() if id(p) in self._pieces]

    @staticmethod
    def _master(piece: Piece) -> Tensor:
        return piece.flat.data.view(-1)[piece.at : piece.at + piece.length]

    def _gradient(self, name: str, piece: Piece) -> Tensor:
        """A view of this rank's part of a gradient; what pads the last rank's share is left out."""
        parameter: Any = self._parameters[name]
        if self._stage == 3:
            found: Tensor = self._optimizer._get_fp32_grad_state_partition(parameter, False)[0]
        else:
            found = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return found.view(-1)[: piece.length]

    def _note_norm(self, name: str) -> None:
        """With the optimiser offloaded, ZeRO-2 keeps each gradient's norm from the time of its reduction."""
        parameter, optimizer = self._parameters[name], self._optimizer
        if self._stage == 2 and getattr(optimizer, "cpu_offload", False):
            norms = optimizer.norm_for_param_grads
            norms[optimizer.get_param_id(parameter)] = self._gradient(
                name, self._pieces[id(parameter)]
            ).norm()

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters' tensors from the ranks' parts, by one sum: bits of one rank and zeros of the others
        add up to these very bits.
        """
        sizes = {name: numel_of(p) for name, p in self._parameters.items()}
        device = next(iter(self._parameters.values())).device
        bits = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=device)
        at, offsets = 0, {}
        for name, size in sizes.items():
            offsets[name], at = at, at + size
        for name, part in parts.items():
            begin = offsets[name] + self._pieces[id(self._parameters[name])].start
            words = part.detach().float().contiguous().view(torch.int32)
            bits[begin : begin + part.numel()] = words.to(device)
        whole = self._ranks.sum(bits).view(torch.float32)
        return {
            name: whole[offsets[name] : offsets[name] + sizes[name]].view(shape_of(p)).clone()
            for name, p in self._parameters.items()
        }


def _part(value: Tensor, piece: Piece) -> Tensor:
    """This rank's elements of a whole tensor, flat."""
    return value.reshape(-1)[piece.start : piece.start + piece.length]


def forget_gradients(optimizer: Any) -> None:
    """Clear ZeRO-3's gradient buffers after an update: a parameter that gets no gradient in a step's first
    micro-batch would otherwise be updated by the one of the step before.
    """
    optimizer.grad_partitions_flat_buffer.zero_()
    for flat in optimizer.fp32_partitioned_groups_flat:
        if flat.grad is not None:
            flat.grad.zero_()


def make_plain(module: nn.Module, own: Mapping[int, set[str]]) -> None:
    """Make a module that ZeRO held an ordinary one again: whole parameters, plain containers, no attribute of
    DeepSpeed's on a parameter.

    Args:
        own: id of a parameter -> names of the attributes it had before.
    """
    split: list[Any] = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if split:
        split[0].all_gather(param_list=split)
    for part in module.modules():
        part._parameters = dict(part._parameters)
        for name in [n for n in vars(part) if n.startswith("ds_") or n in ZERO_ATTRIBUTES]:
            delattr(part, name)
    for parameter in module.parameters():
        for name in set(vars(parameter)) - own.get(id(parameter), set()):
            delattr(parameter, name)
