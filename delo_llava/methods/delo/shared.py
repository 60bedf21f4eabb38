"""One narrow product for the linears that read one tensor: queries, keys and values; gate and up.

With k factors a product x Aᵀ reads all of x for k columns, so it costs what reading costs: with the A of
siblings side by side, x is read once for all of them, and once more in the backward pass, where their
gradients to x are one product too. The first sibling of a block makes the columns of all, the others take
theirs, if they are given the same tensor.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from delo_llava.methods.delo.layer import DeloLayer
    from delo_llava.methods.delo.plan import RoutePlan, RouteTable

#: Names of linears of one module that read the same tensor, in the order in which they are called.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Held:
    """What the first sibling computed, and for what."""

    x: Tensor
    version: int
    plan: "RoutePlan"
    parts: tuple[Tensor, ...]


class Siblings:
    """Linears that read one tensor, unless one of them turns out to be given another: from the next forward
    on, each is then computed alone. (Not within a forward, which checkpointing must be able to repeat.)
    """

    def __init__(self, members: Sequence["DeloLayer"]) -> None:
        self.members = tuple(members)
        self._held: Held | None = None
        self._missed: weakref.ref[RoutePlan] | None = None

    def apart(self, plan: "RoutePlan") -> bool:
        """Whether each is computed alone in a forward of this plan. ZeRO-3 gives every module a tensor of its
        own, and weights only inside their module.
        """
        if self._missed is not None and self._missed() is not plan:
            return True
        return any(hasattr(p, "ds_id") for p in self.members[0].delo_A.parameters())

    def narrow(
        self, layer: "DeloLayer", x: Tensor, plan: "RoutePlan", weight: Tensor | None
    ) -> Tensor | None:
        """A member's (x Aᵀ) ∘ gates ∘ weight, B×T×k; None: it must be computed alone."""
        if self.apart(plan):
            return None
        place = next(i for i, member in enumerate(self.members) if member is layer)
        version = 0 if x.is_inference() else x._version
        if place == 0:
            parts = narrow(self.members, x, plan, plan.language, weight)
            self._held = Held(x, version, plan, parts)
            return parts[0]
        held = self._held
        if held is None or held.x is not x or held.version != version or held.plan is not plan:
            self._held, self._missed = None, weakref.ref(plan)
            return None
        if place == len(self.members) - 1:
            self._held = None
        return held.parts[place]


def narrow(
    layers: Sequence["DeloLayer"],
    x: Tensor,
    plan: "RoutePlan",
    table: "RouteTable",
    weight: Tensor | None,
    text_only: bool = False,
) -> tuple[Tensor, ...]:
    """(x Aᵀ) ∘ gates ∘ weight of each layer, R×T×k, in x's type.

    Args:
        x: R×T×d_in; table: the layers' factors and gates.
        weight: R×T×k, how much each factor acts on each token; None: wholly on all.
        text_only: the text half of the factors alone.
    """

    def gathered() -> Tensor:
        each = [layer.gather(layer.delo_A, plan, table.a, text_only, x.dtype) for layer in layers]
        return each[0] if len(each) == 1 else torch.cat(each, 1)

    a = plan.kept(("A", *map(id, layers), text_only, x.dtype), gathered)
    u = torch.bmm(x, a.transpose(1, 2))
    if table.gates is not None:
        start = layers[0].rank if text_only else 0
        gates = [table.gates[layer.slot][:, start:] for layer in layers]
        u = u * torch.cat(gates, 1).unsqueeze(1).to(u.dtype)
    if weight is not None:
        parts = u.unflatten(-1, (len(layers), -1))
        u = (parts * weight.unsqueeze(2).to(u.dtype)).flatten(2)
    return u.chunk(len(layers), dim=-1)
