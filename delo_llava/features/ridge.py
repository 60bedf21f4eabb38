"""Ridge maps between the modalities' queries, solved in closed form from sums over complete samples: sums of
parts are exact sums of the whole, so nothing is forgotten and any number of ranks gives the same."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from delo_llava.errors import DeloError
from delo_llava.features.blocks import RowBlocks
from delo_llava.features.moments import pack, pack_half, unpack, unpack_half
from delo_llava.features.queries import Queries
from delo_llava.strict import read_tensors

#: Which modalities' products are kept: image (0) and text (1).
PAIRS = ((0, 0), (1, 1), (0, 1))
#: Samples that a map is fitted to at least: with one, nothing is left once its mean is taken away.
FEWEST = 2


@dataclass
class RidgeStatistics:
    """Sufficient statistics of both ridge maps over complete samples, in float64; sums of parts are exact
    sums of the whole. Read them by `tensors`, which holds every row that was observed.

    Attributes:
        count: number of samples, a float64 scalar.
        sums: 2×d, sums of image and text queries.
        products: 3×d×d, sums of image·imageᵀ, text·textᵀ, image·textᵀ.
    """

    count: Tensor
    sums: Tensor
    products: Tensor
    _blocks: RowBlocks = field(init=False, repr=False, compare=False)

    FILE = "ridge_statistics.safetensors"

    def __post_init__(self) -> None:
        self._blocks = RowBlocks(2 * self.sums.shape[1], partial(_add_products, self.products))

    @classmethod
    def empty(cls, hidden: int) -> "RidgeStatistics":
        """No samples yet, for queries of length `hidden`."""
        zeros = torch.zeros(3, hidden, hidden, dtype=torch.float64)
        return cls(torch.zeros((), dtype=torch.float64), torch.zeros(2, hidden, dtype=torch.float64), zeros)

    def observe(self, queries: Queries, presence: Tensor) -> None:
        """Add the complete rows of a batch (`presence`: bool B×2); both may lie on any device."""
        complete = presence.all(1).cpu()
        pairs = [q.detach().cpu()[complete] for q in (queries.image, queries.text)]
        self.count += complete.sum()
        self.sums += torch.stack([q.double().sum(0) for q in pairs])
        self._blocks.add(torch.cat(pairs, 1))

    def merge(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """The statistics of both sets of samples together."""
        theirs = other.tensors()
        return RidgeStatistics(**{name: tensor + theirs[name] for name, tensor in self.tensors().items()})

    def solve(self, target: Literal["image", "text"] | str, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Ridge regression of the target modality on the other, with an intercept.

        Minimises Σ‖(x − x̄) W − (y − ȳ)‖² + λ‖W‖² with λ = relative_ridge · mean diagonal of the centred Gram
        matrix.

        Returns:
            W (d×d) and the offset ȳ − x̄ W (d), fp32.

        Raises:
            DeloError: with fewer than `FEWEST` complete samples.
        """
        if self.count < FEWEST:
            raise DeloError(
                "A ridge map needs complete samples, with image and text",
                given=f"{int(self.count)} samples",
                fix="leave the map the identity, or add records with both",
            )
        self._blocks.flush()
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
        self._blocks.flush()
        return {"count": self.count, "sums": self.sums, "products": self.products}

    def save(self, folder: Path) -> None:
        """Write the statistics of one task into its folder, second moments as `features.moments` has them."""
        self._blocks.flush()
        mean = self.sums / self.count.clamp(min=1)
        centred = self.products - self.count * torch.stack([torch.outer(mean[i], mean[j]) for i, j in PAIRS])
        (image, left), (text, right) = pack_half(centred[0]), pack_half(centred[1])
        found = {
            "count": self.count.clone(), "sums": self.sums.clone(), "deviations": torch.stack([left, right]),
            "image": image, "text": text, "cross": pack(centred[2], left, right),
        }  # fmt: skip
        save_file(found, folder / self.FILE)

    @classmethod
    def load(cls, folder: Path) -> "RidgeStatistics":
        """Read what `save` wrote."""
        if not (folder / cls.FILE).is_file():
            raise DeloError(
                "Ridge statistics are missing", given=folder / cls.FILE, fix="train the stage again"
            )
        found = read_tensors(folder / cls.FILE, "Ridge statistics")
        if "products" in found:  # as earlier versions wrote them, in float64
            return cls(**found)
        count, sums, (left, right) = found["count"], found["sums"], found["deviations"]
        halves = unpack_half(found["image"], left), unpack_half(found["text"], right)
        centred = torch.stack([*halves, unpack(found["cross"], left, right)])
        mean = sums / count.clamp(min=1)
        products = centred + count * torch.stack([torch.outer(mean[i], mean[j]) for i, j in PAIRS])
        return cls(count, sums, products)


def _add_products(products: Tensor, rows: Tensor) -> None:
    """Add the products of n×2d rows, image beside text, to 3×d×d sums, in place."""
    image, text = rows.tensor_split(2, 1)
    for total, left, right in zip(products, (image, text, image), (image, text, text), strict=True):
        total.addmm_(left.T, right)
