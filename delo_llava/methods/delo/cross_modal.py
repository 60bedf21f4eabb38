"""Cross-modal guided routing, symmetric: a missing modality's query is a map φ of the present one's
(specification 5.2, 10).

`none` does without it: the query of what is missing is zero, and its factors those of the selectors' biases.
`identity` is what the released code does for text; `linear` is learned with the task, identity plus a
low-rank term that starts at zero; `ridge` is solved in closed form from sums over complete samples of all
tasks so far, and forgets nothing.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.errors import DeloError
from delo_llava.features.queries import Queries
from delo_llava.features.ridge import RidgeStatistics

CrossModalKind = Literal["identity", "linear", "ridge", "none"]


class Routed(NamedTuple):
    """What φ makes of the queries; each B×d.

    Attributes:
        image, text: the routing queries, with proxies where a modality is missing.
        proxy_image, proxy_text: φ of the other modality for every row (of use for the alignment loss on
            complete rows).
    """

    image: Tensor
    text: Tensor
    proxy_image: Tensor
    proxy_text: Tensor


class CrossModal(nn.Module):
    """φ of one task, both directions. Its parameters and buffers are direct members, so that PEFT saves them
    by
    name.

    Args:
        kind: `identity`, `linear`, `ridge` or `none`.
        hidden: d, the length of a query.
        rank: of the learned term of `linear`.
    """

    def __init__(self, kind: CrossModalKind, hidden: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.image_down = nn.Parameter(torch.randn(rank, hidden) * hidden**-0.5)
            self.image_up = nn.Parameter(torch.zeros(hidden, rank))
            self.text_down = nn.Parameter(torch.randn(rank, hidden) * hidden**-0.5)
            self.text_up = nn.Parameter(torch.zeros(hidden, rank))
        elif kind == "ridge":  # starts as the identity, until `fit` is given statistics
            for name in ("image", "text"):
                self.register_buffer(f"{name}_weight", torch.eye(hidden))
                self.register_buffer(f"{name}_offset", torch.zeros(hidden))

    def map(self, query: Tensor, target: Literal["image", "text"]) -> Tensor:
        """φ into the `target` modality's space, normalised: B×d."""
        query = query.double()  # as in the router: the result must not hang on the batch's shape
        if self.kind == "linear":
            up, down = getattr(self, f"{target}_up"), getattr(self, f"{target}_down")
            query = query + query @ down.double().T @ up.double().T
        elif self.kind == "ridge":
            weight, offset = getattr(self, f"{target}_weight"), getattr(self, f"{target}_offset")
            query = query @ weight.double() + offset.double()
        return F.normalize(query, dim=-1).float()

    def fit(self, statistics: RidgeStatistics, relative_ridge: float) -> None:
        """Set the ridge map from `statistics`; it then stays as it is for this task."""
        if self.kind != "ridge":
            raise DeloError("Only a ridge map is fitted in closed form", given=self.kind, allowed=["ridge"])
        for target in ("image", "text"):
            weight, offset = statistics.solve(target, relative_ridge)
            getattr(self, f"{target}_weight").copy_(weight)
            getattr(self, f"{target}_offset").copy_(offset)

    def forward(self, queries: Queries, presence: Tensor) -> Routed:
        """Replace the query of each missing modality.

        Args:
            queries: of the batch, B×d each.
            presence: bool B×2 (image, text). A row with neither routes by its instruction.
        """
        if self.kind == "none":
            zero = torch.zeros_like(queries.image)
            image, text = (torch.where(presence[:, [i]], query, zero) for i, query in enumerate(queries[:2]))
            return Routed(image, text, zero, zero)
        proxy_image, proxy_text = self.map(queries.text, "image"), self.map(queries.image, "text")
        has_image, has_text = presence[:, :1], presence[:, 1:]
        image = torch.where(has_image, queries.image, torch.where(has_text, proxy_image, queries.instruction))
        text = torch.where(has_text, queries.text, torch.where(has_image, proxy_text, queries.instruction))
        return Routed(image, text, proxy_image, proxy_text)
