"""The plan of one forward: which factors every adapted linear uses for every row, decided once and read by
all layers.

A plan is plain data in the caller's hands; no tensor carries attributes (trap T1) and nothing in it changes
while layers read it, except caches of gathered factors when no gradient is wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from delo_llava.data.segments import SEGMENT_IMAGE
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods.delo.router import Selection


@dataclass(frozen=True)
class RouteTable:
    """Per linear: rows of the (stacked) A and B pools, int64 R×k, and gates R×k or None. R is rows, or
    images in
    the projector."""

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    gates: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Packing:
    """Where the tokens of N images lie when they are padded to N×T: `flat` int64 total, or None when all
    have T
    tokens."""

    images: int
    longest: int
    flat: Tensor | None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Packing":
        """The packing of images with these token counts."""
        longest = max(lengths)
        if min(lengths) == longest:
            return cls(len(lengths), longest, None)
        starts = [torch.arange(n) + i * longest for i, n in enumerate(lengths)]
        return cls(len(lengths), longest, torch.cat(starts).to(device))

    def pad(self, x: Tensor) -> Tensor:
        """Packed total×d to N×T×d, zeros in the gaps."""
        if self.flat is None:
            return x.view(self.images, self.longest, x.shape[-1])
        padded = x.new_zeros(self.images * self.longest, x.shape[-1]).index_copy(0, self.flat, x)
        return padded.view(self.images, self.longest, x.shape[-1])

    def unpad(self, y: Tensor) -> Tensor:
        """N×T×d back to total×d."""
        flat = y.reshape(-1, y.shape[-1])
        return flat if self.flat is None else flat.index_select(0, self.flat)


@dataclass
class RoutePlan:
    """The decision for one forward (and, in `generate`, for all its decode steps).

    Attributes:
        selection: positions within the pools, for every linear and row; the row-wise truth the tables are
            made of.
        tasks: task of each row; used: the distinct ones, in the order their pools are stacked.
        queries: frozen queries; presence: bool B×2.
        pool_size: E; text_start: where the text pool begins in a linear's table, 0 where both modalities
            share one.
        language, projector: what layers read.
        token_weight: B×S×2r, 1 where a factor acts on a token; None when every token gets both updates.
        inputs: what is known of the batch.
        packings: of the images' tokens in the projector, by how many tokens there are in all.
        cache: gathered factors, filled by layers when no gradient is wanted.
    """

    selection: Selection
    tasks: list[str]
    used: tuple[str, ...]
    queries: Queries
    presence: Tensor
    pool_size: int
    text_start: int
    projector_slots: int
    language: RouteTable
    inputs: RouteInputs
    projector: RouteTable | None = None
    token_weight: Tensor | None = None
    packings: dict[int, Packing] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        selection: Selection,
        inputs: RouteInputs,
        tasks: list[str],
        used: tuple[str, ...],
        queries: Queries,
        *,
        pool_size: int,
        text_start: int,
        projector_slots: int,
        own_tokens: bool,
    ) -> "RoutePlan":
        """Lay the selection out for the layers: one contiguous table per linear, offsets of modality and task
        included."""
        position = torch.tensor([used.index(t) for t in tasks], device=inputs.presence.device)
        plan = cls(
            selection,
            tasks,
            used,
            queries,
            inputs.presence,
            pool_size,
            text_start,
            projector_slots,
            _language_table(selection, position, text_start, pool_size, projector_slots),
            inputs,
        )
        if own_tokens:
            is_image = inputs.segments == SEGMENT_IMAGE
            rank = selection.image_a.shape[-1]
            plan.token_weight = torch.stack([is_image, ~is_image], -1).float().repeat_interleave(rank, -1)
        if len(inputs.image_rows):
            plan.projector = _projector_table(
                selection, position, pool_size, projector_slots, inputs.image_rows
            )
        return plan

    def packing(self, tokens: int) -> Packing:
        """Where the images' tokens lie in a tensor of the projector with so many of them."""
        if tokens not in self.packings:
            self.packings[tokens] = Packing.of(self.inputs.image_lengths(tokens), self.presence.device)
        return self.packings[tokens]

    def kept(self, key: Any, gathered: Callable[[], Tensor]) -> Tensor:
        """Factors by a layer's key; kept when no gradient is wanted, so that decode steps gather nothing."""
        if torch.is_grad_enabled():
            return gathered()
        if key not in self.cache:
            self.cache[key] = gathered()
        found: Tensor = self.cache[key]
        return found

    @property
    def rows(self) -> int:
        """Number of rows, beams included."""
        return len(self.tasks)

    def index_select(self, rows: Tensor) -> "RoutePlan":
        """The plan of some rows in a new order (beams), for decoding: images are behind us, so no projector
        table."""
        selection, chosen = self.selection.rows(rows), [self.tasks[i] for i in rows.tolist()]
        position = torch.tensor([self.used.index(t) for t in chosen], device=rows.device)
        table = _language_table(selection, position, self.text_start, self.pool_size, self.projector_slots)
        weight = None if self.token_weight is None else self.token_weight.index_select(0, rows)
        return replace(
            self,
            selection=selection,
            tasks=chosen,
            queries=self.queries.rows(rows),
            presence=self.presence[rows],
            language=table,
            projector=None,
            token_weight=weight,
            cache={},
        )


def _language_table(
    selection: Selection, position: Tensor, text_start: int, pool_size: int, skip: int
) -> RouteTable:
    """Image and text factors side by side; pools are stacked [task][image E | text E], or [task][E] where
    they are shared.
    """
    start = (position * (text_start + pool_size)).view(-1, 1, 1)

    def joined(image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([image[:, skip:] + start, text + start + text_start], -1)
        return both.transpose(0, 1).contiguous().unbind(0)

    gates = None
    if selection.image_gate is not None and selection.text_gate is not None:
        both = torch.cat([selection.image_gate[:, skip:], selection.text_gate], -1)
        gates = both.transpose(0, 1).contiguous().unbind(0)
    return RouteTable(
        joined(selection.image_a, selection.text_a), joined(selection.image_b, selection.text_b), gates
    )


def _projector_table(
    selection: Selection, position: Tensor, pool_size: int, slots: int, image_rows: Tensor
) -> RouteTable:
    """Image factors only, one row per image; pools are stacked [task][image E]."""
    start = (position * pool_size).view(-1, 1, 1)

    def per_image(index: Tensor) -> tuple[Tensor, ...]:
        return index[:, :slots].index_select(0, image_rows).transpose(0, 1).contiguous().unbind(0)

    gates = None if selection.image_gate is None else per_image(selection.image_gate)
    return RouteTable(per_image(selection.image_a + start), per_image(selection.image_b + start), gates)
