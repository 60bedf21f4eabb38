"""The router of one task: from two queries to the factors of every adapted linear, in one go (specification 4
and 5, M1).

A shared down-projection per modality gives a latent z; one stacked product gives the scores of all A and B
pools of all linears; one stable sorted top-k chooses A, one chooses B. B's scores also depend on the chosen A
(conditional selection): for a finite pool the specification's term U_jᵀ a_e is a table C[j, e], which `table`
learns directly and `factor` computes from U and the pools.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.methods.delo.cross_modal import Routed

Gate = Literal["ste", "none", "softmax"]
Conditional = Literal["table", "none", "factor"]


class Selection(NamedTuple):
    """Factors chosen for a batch. Linears are ordered: projector first, then language layers; text has the
    language ones only.

    Attributes:
        image_a, image_b: int64 B×S_v×r, positions in the image pools, best first; the j-th A is paired with
            the j-th B.
        text_a, text_b: int64 B×S_t×r.
        image_gate, text_gate: factors of the pairs, shaped like the indices; None when they are one and carry
            no gradient.
        image_latent, text_latent: z of the routing queries, B×latent.
        image_proxy, text_proxy: z of what φ makes of the other modality's query, for the alignment loss.
    """

    image_a: Tensor
    image_b: Tensor
    text_a: Tensor
    text_b: Tensor
    image_gate: Tensor | None
    text_gate: Tensor | None
    image_latent: Tensor
    text_latent: Tensor
    image_proxy: Tensor
    text_proxy: Tensor

    def rows(self, index: Tensor) -> "Selection":
        """The selection of some rows."""
        return Selection._make(None if t is None else t.index_select(0, index) for t in self)


def top_factors(scores: Tensor, rank: int) -> Tensor:
    """Positions of the `rank` largest scores along the last axis, best first; ties go to the lower
    position."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :rank]


class Router(nn.Module):
    """Selectors of one task. All parameters are direct members: PEFT strips the adapter's name, ZeRO-3
    gathers
    them together.

    Args:
        hidden: d, length of a query.
        latent: width of the shared down-projection.
        slots: numbers of linears with an image pool and with a text pool (S_v, S_t).
        pool_size: E; rank: r.
        gate, temperature: see `gates`.
        conditional: how B depends on the chosen A.
        widths: d_in of each image slot and of each text slot; needed for `factor` only.
    """

    def __init__(
        self,
        *,
        hidden: int,
        latent: int,
        slots: tuple[int, int],
        pool_size: int,
        rank: int,
        gate: Gate = "ste",
        temperature: float = 1.0,
        conditional: Conditional = "table",
        widths: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        super().__init__()
        self.pool_size, self.rank = pool_size, rank
        self.gate, self.temperature, self.conditional = gate, temperature, conditional
        for name, count, inputs in zip(("image", "text"), slots, widths, strict=True):
            # unit queries times N(0, 1) rows: latents and scores start with variance one
            self.register_parameter(f"{name}_down", nn.Parameter(torch.randn(latent, hidden)))
            head = torch.randn(count * 2 * pool_size, latent) * latent**-0.5
            self.register_parameter(f"{name}_head", nn.Parameter(head))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(count * 2 * pool_size)))
            if conditional == "table":
                table = torch.randn(count, rank, pool_size, pool_size) * rank**-0.5
                self.register_parameter(f"{name}_table", nn.Parameter(table))
            elif conditional == "factor":
                for i, width in enumerate(inputs):
                    factor = torch.randn(rank, width, pool_size)
                    self.register_parameter(f"{name}_factor{i}", nn.Parameter(factor))

    def latent(self, query: Tensor, modality: Literal["image", "text"]) -> Tensor:
        """z = W q of one modality, B×latent, float64: near-ties must not fall with the shape of the batch."""
        return F.linear(query.double(), getattr(self, f"{modality}_down").double())

    def forward(
        self, routed: Routed, pools: tuple[list[Tensor], list[Tensor]] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Choose factors for the routing queries: the fields of a `Selection`, as a plain tuple.

        `pools` are the A pools (E×d_in, detached here) of every image and text slot, for the `factor` form
        only. A plain tuple, because DeepSpeed looks for gradients in tuples, not in classes of ours.
        """
        with torch.autocast(routed.image.device.type, enabled=False):
            z_image, z_text = self.latent(routed.image, "image"), self.latent(routed.text, "text")
            image_a, image_b, image_gate = self._choose(z_image, "image", pools and pools[0])
            text_a, text_b, text_gate = self._choose(z_text, "text", pools and pools[1])
            proxies = self.latent(routed.proxy_image, "image"), self.latent(routed.proxy_text, "text")
        return image_a, image_b, text_a, text_b, image_gate, text_gate, z_image, z_text, *proxies

    def _choose(
        self, z: Tensor, modality: str, pools: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head, bias = getattr(self, f"{modality}_head"), getattr(self, f"{modality}_bias")
        scores_a, scores_b = (
            F.linear(z, head.double(), bias.double()).view(len(z), -1, 2, self.pool_size).unbind(2)
        )
        a = top_factors(scores_a, self.rank)
        table = self._table(modality, pools)
        if table is not None:
            # row (slot, j, e) of the flattened table is C_j[e] of that slot
            rows = torch.arange(table.shape[0] * self.rank, device=z.device).view(1, -1, self.rank)
            first = rows * self.pool_size
            scores_b = scores_b + F.embedding(first + a, table.double().reshape(-1, self.pool_size)).sum(2)
        b = top_factors(scores_b, self.rank)
        gate_a, gate_b = self.gates(scores_a, a), self.gates(scores_b, b)
        return a, b, None if gate_a is None or gate_b is None else (gate_a * gate_b).float()

    def _table(self, modality: str, pools: list[Tensor] | None) -> Tensor | None:
        """C as slots×r×E×E: learned, computed from U and the pools, or absent."""
        if self.conditional == "table":
            learned: Tensor = getattr(self, f"{modality}_table")
            return learned
        if self.conditional == "none" or pools is None:
            return None
        parts = []
        for i, pool in enumerate(pools):
            # pools start with variance 1/d_in, so this is the 1/sqrt(r·d_in) of note 5
            factor = getattr(self, f"{modality}_factor{i}")
            parts.append(torch.einsum("jdk,ed->jek", factor, pool.detach().float()) * self.rank**-0.5)
        return torch.stack(parts)

    def gates(self, scores: Tensor, chosen: Tensor) -> Tensor | None:
        """Factors of the chosen: exactly one with the gradient of a softmax (`ste`), renormalised softmax
        with mean
        one (`softmax`), or nothing (`none`)."""
        if self.gate == "none" or (self.gate == "ste" and not torch.is_grad_enabled()):
            return None
        if self.gate == "softmax":
            return self.rank * (scores.gather(-1, chosen) / self.temperature).softmax(-1)
        p = (scores / self.temperature).softmax(-1).gather(-1, chosen)
        return 1 + (p - p.detach())  # in this order the value is one to the last bit
