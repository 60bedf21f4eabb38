"""Cross-modal guided routing, symmetric: a missing modality's query is a map φ of the present one's
(specification 5.2, 10).

`identity` is what the released code does for text; `linear` is learned with the task, identity plus a
low-rank term that starts at zero; `ridge` is solved in closed form from sums over complete samples of all
tasks so far, and forgets nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.errors import DeloError
from delo_llava.routing.queries import Queries
from delo_llava.strict import read_tensors

CrossModalKind = Literal["identity", "linear", "ridge"]


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
        kind: `identity`, `linear` or `ridge`.
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

    def fit(self, statistics: "RidgeStatistics", relative_ridge: float) -> None:
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
        proxy_image, proxy_text = self.map(queries.text, "image"), self.map(queries.image, "text")
        has_image, has_text = presence[:, :1], presence[:, 1:]
        image = torch.where(has_image, queries.image, torch.where(has_text, proxy_image, queries.instruction))
        text = torch.where(has_text, queries.text, torch.where(has_image, proxy_text, queries.instruction))
        return Routed(image, text, proxy_image, proxy_text)


@dataclass
class RidgeStatistics:
    """Sufficient statistics of both ridge maps over complete samples, in float64; sums of parts are exact
    sums of
    the whole.

    Attributes:
        count: number of samples, a float64 scalar.
        sums: 2×d, sums of image and text queries.
        products: 3×d×d, sums of image·imageᵀ, text·textᵀ, image·textᵀ.
    """

    count: Tensor
    sums: Tensor
    products: Tensor

    FILE = "ridge_statistics.safetensors"

    @classmethod
    def empty(cls, hidden: int) -> "RidgeStatistics":
        """No samples yet, for queries of length `hidden`."""
        zeros = torch.zeros(3, hidden, hidden, dtype=torch.float64)
        return cls(torch.zeros((), dtype=torch.float64), torch.zeros(2, hidden, dtype=torch.float64), zeros)

    def observe(self, queries: Queries, presence: Tensor) -> None:
        """Add the complete rows of a batch (`presence`: bool B×2)."""
        complete = presence.all(1).nonzero().squeeze(1)
        image, text = (
            q.detach().index_select(0, complete).double().cpu() for q in (queries.image, queries.text)
        )
        self.count += len(complete)
        self.sums += torch.stack([image.sum(0), text.sum(0)])
        self.products += torch.stack([image.T @ image, text.T @ text, image.T @ text])

    def merge(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """The statistics of both sets of samples together."""
        return RidgeStatistics(
            self.count + other.count, self.sums + other.sums, self.products + other.products
        )

    def solve(self, target: Literal["image", "text"] | str, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Ridge regression of the target modality on the other, with an intercept.

        Minimises Σ‖(x − x̄) W − (y − ȳ)‖² + λ‖W‖² with λ = relative_ridge · mean diagonal of the centred Gram
        matrix.

        Returns:
            W (d×d) and the offset ȳ − x̄ W (d), fp32.

        Raises:
            DeloError: with fewer than two complete samples.
        """
        if self.count < 2:
            raise DeloError(
                "A ridge map needs complete samples, with image and text",
                given=f"{int(self.count)} samples",
                fix="use --delo.cross_modal=identity, or a lower missing ratio",
            )
        mean = self.sums / self.count
        source, goal = (1, 0) if target == "image" else (0, 1)
        gram = self.products[source] - self.count * torch.outer(mean[source], mean[source])
        cross = self.products[2].T if target == "image" else self.products[2]
        cross = cross - self.count * torch.outer(mean[source], mean[goal])
        ridge = max(relative_ridge * gram.diagonal().mean().item(), torch.finfo(torch.float64).tiny)
        weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)
        return weight.float(), (mean[goal] - mean[source] @ weight).float()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name (what a reduction over ranks adds up, and what is saved)."""
        return {"count": self.count, "sums": self.sums, "products": self.products}

    def save(self, folder: Path) -> None:
        """Write the statistics of one task into its folder."""
        save_file({k: v.clone().contiguous() for k, v in self.tensors().items()}, folder / self.FILE)

    @classmethod
    def load(cls, folder: Path) -> "RidgeStatistics":
        """Read what `save` wrote."""
        if not (folder / cls.FILE).is_file():
            raise DeloError(
                "Ridge statistics are missing", given=folder / cls.FILE, fix="train the stage again"
            )
        return cls(**read_tensors(folder / cls.FILE, "Ridge statistics"))
