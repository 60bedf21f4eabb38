"""Queries: one vector per sample and view, from features no adapter touches (specification M3).

Image: mean of the frozen projector's output over the image's tokens. Text and instruction: mean of the frozen
word embeddings over the tokens of that segment. Padding, template words and answers belong to no segment, so
they never enter a mean. All queries are fp32 and L2-normalised; a sample without a view has the zero vector
there.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The views of a sample, in the order of `Queries`.
VIEWS: tuple[str, str, str] = ("image", "text", "instruction")


class Queries(NamedTuple):
    """Frozen queries of a batch, each B×d, fp32, of length one (or zero where the view is absent)."""

    image: Tensor
    text: Tensor
    instruction: Tensor

    def rows(self, index: Tensor) -> "Queries":
        """The queries of some rows."""
        return Queries(*(q.index_select(0, index) for q in self))


def segment_mean(embed: nn.Module, input_ids: Tensor, segments: Tensor, segment: int) -> Tensor:
    """Normalised mean of word embeddings over the tokens of `segment`, B×d; zero for rows without any.

    Only the tokens that count are looked up. Sums are in float64, so that a row's query, and with it its
    route,
    does not hang on how the rest of the batch was padded.
    """
    row, place = (segments == segment).nonzero(as_tuple=True)
    words = embed(input_ids[row, place]).double()
    owner = F.one_hot(
        row, len(input_ids)
    ).double()  # a product is deterministic where index_add on a GPU is not
    return F.normalize(owner.T @ words, dim=-1).float()


def image_mean(
    features: Tensor, lengths: list[int], rows: Tensor, batch: int, kept: Tensor | None = None
) -> Tensor:
    """Normalised mean of the projector's output over each row's image tokens.

    Args:
        features: packed total×d, or units×T×d.
        lengths: tokens of each of the N images.
        rows: int64 N, the batch row of each image.
        batch: number of rows B.
        kept: bool total, the tokens that the language model sees, if not all.

    Returns:
        B×d; zero for rows without an image. A row with several images has the mean over all their tokens.
    """
    flat = features.double().reshape(-1, features.shape[-1])
    if kept is not None:
        lengths = [int(part.sum()) for part in kept.split(lengths)]
        flat = flat[kept]
    sums = torch.stack([part.sum(0) for part in flat.split(lengths)])
    return F.normalize(F.one_hot(rows, batch).double().T @ sums, dim=-1).float()
