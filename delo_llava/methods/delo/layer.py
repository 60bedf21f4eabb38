"""The expert layer around a frozen linear: y = W₀x + s·Σ_j g_j b_j (a_jᵀ x), factors gathered per sample
(specification 4, M5).

Two look-ups and two small batched products, of which linears that read the same tensor share the first
(`shared`); ΔW is never formed and samples are never looped over. The layer does not know its task: it reads
the rows of the pools from the plan.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.adapters.tuner import CarriedLayer
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.plan import RoutePlan, RouteTable
from delo_llava.methods.delo.shared import Siblings, narrow


class DeloLayer(CarriedLayer):
    """A frozen linear with one pair of pools per adapter.

    A pool is an embedding table, [image factors | text factors] × width (one pool of factors where the
    modalities share it): its look-up is the gather, and as a module of its own it is what ZeRO-3 gathers and
    releases (parameters in a ParameterDict would not be).
    """

    adapter_layer_names = ("delo_A", "delo_B")
    other_param_names = ("scale",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.slot = -1  # position among the language or projector layers, set by the model after injection
        self.rank = 0
        self.siblings: Siblings | None = None  # the linears that read the same tensor, set with the slot
        self.scale: dict[str, float] = {}
        self.delo_A, self.delo_B = nn.ModuleDict(), nn.ModuleDict()

    def update_layer(self, name: str, config: DeloConfig) -> None:
        """Add the pools of adapter `name`: A ~ N(0, 1/d_in), B = 0, fp32, drawn on the CPU so that a seed
        fixes them."""
        factors = config.pool_starts(self.projector)[1]
        a = torch.randn(factors, self.in_features, device="cpu") * self.in_features**-0.5
        b = torch.zeros(factors, self.out_features, device="cpu")
        self.rank, self.scale[name] = config.r, config.scale
        for pools, start in ((self.delo_A, a), (self.delo_B, b)):
            pools[name] = nn.Embedding(len(start), start.shape[1], _weight=start)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus the routed update; the base's alone while experts are off or the frozen
        features are
        computed."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.acts or self.carrier.suspended:
            return y
        plan: RoutePlan = self.carrier.current()
        if not self.projector:
            return self._language(x, y, plan, shared=True)
        if plan.projector is None:
            raise self.carrier.missing_plan()
        packing = plan.packing(x.shape[:-1].numel())
        padded, flat = packing.pad(x.reshape(-1, x.shape[-1])), y.reshape(-1, self.out_features)
        if packing.flat is None:
            return self._add(padded, packing.pad(flat), plan, plan.projector, None).view(y.shape)
        nothing = padded.new_zeros(*padded.shape[:2], self.out_features)
        delta = packing.unpad(self._add(padded, nothing, plan, plan.projector, None))
        return y + delta.to(y.dtype).view(y.shape)

    def _language(self, x: Tensor, y: Tensor, plan: RoutePlan, shared: bool) -> Tensor:
        if x.dim() == 2:  # a mixture's shared expert sees all rows' tokens in one line
            rows = (plan.rows, -1)
            return self._language(
                x.view(*rows, x.shape[-1]), y.view(*rows, y.shape[-1]), plan, False
            ).view_as(y)
        weight = plan.token_weight
        if weight is None:
            return self._add(x, y, plan, plan.language, None, shared=shared)
        offset = self.carrier.offset
        if offset >= weight.shape[1]:  # decoding: what is generated is text, so only the text half works
            return self._add(x, y, plan, plan.language, None, text_only=True)
        if offset or x.shape[1] != weight.shape[1]:
            weight = self._weight_at(weight, offset, x.shape[1])
        return self._add(x, y, plan, plan.language, weight, shared=shared)

    def _weight_at(self, weight: Tensor, start: int, length: int) -> Tensor:
        """Token weights of `length` positions from `start`; what lies beyond the prompt is text."""
        window = weight[:, start : start + length]
        beyond = weight.new_zeros(len(weight), length - window.shape[1], weight.shape[2])
        beyond[..., self.rank :] = 1
        return torch.cat([window, beyond], 1)

    def _add(
        self,
        x: Tensor,
        y: Tensor,
        plan: RoutePlan,
        table: RouteTable,
        weight: Tensor | None,
        text_only: bool = False,
        shared: bool = False,
    ) -> Tensor:
        """y + s·((x Aᵀ) ∘ gates ∘ weight) B for x R×T×d_in, in x's type; y is written over where it may be.

        `shared`: x is what the linear was given, so its siblings may be given it too.
        """
        u = self.siblings.narrow(self, x, plan, weight) if shared and self.siblings is not None else None
        if u is None:
            [u] = narrow([self], x, plan, table, weight, text_only)
        b = plan.kept(
            ("B", id(self), text_only, x.dtype),
            lambda: self.gather(self.delo_B, plan, table.b, text_only, x.dtype),
        )
        scale = self.scale[plan.used[0]]
        if y.dtype != u.dtype:
            return y + (torch.bmm(u, b) * scale).to(y.dtype)
        if self._is_ours(y):
            return y.baddbmm_(u, b, alpha=scale)
        return torch.baddbmm(y, u, b, alpha=scale)

    def _is_ours(self, y: Tensor) -> bool:
        """Nobody else has the base's output: no view (a bias makes one, whose backward copies), no hook that
        saw it (ZeRO-3's, a watcher's).
        """
        return not y._is_view() and not self.base_layer._forward_hooks

    def gather(
        self,
        pools: nn.ModuleDict,
        plan: RoutePlan,
        rows: Sequence[Tensor],
        text_only: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """The chosen factors of `pools`, R×k×width; `rows` are those of all layers, R×k."""
        own = rows[self.slot][:, self.rank :] if text_only else rows[self.slot]
        if len(plan.used) == 1:
            found: Tensor = pools[plan.used[0]](own)
            return found.to(dtype)
        stacked: list[Tensor] = [pools[task].weight for task in plan.used]  # type: ignore[misc]
        return F.embedding(own, torch.cat(stacked)).to(dtype)
