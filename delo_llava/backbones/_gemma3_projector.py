"""Gemma 3's projector with its bare weight as a linear."""

from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector


class Projector(nn.Module):
    """Gemma 3's projector, bit by bit, with an `nn.Linear`: patches pooled, normed, projected."""

    def __init__(self, given: Gemma3MultiModalProjector) -> None:
        super().__init__()
        self.side, self.pool, self.norm = given.patches_per_image, given.avg_pool, given.mm_soft_emb_norm
        weight = given.mm_input_projection_weight.detach().T.contiguous()
        self.project = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.project.weight = nn.Parameter(weight)

    def forward(self, seen: Tensor) -> Tensor:
        """N×patches×d of the tower to N×tokens×d of the language model."""
        grid = seen.transpose(1, 2).unflatten(2, (self.side, self.side)).contiguous()
        pooled: Tensor = self.pool(grid).flatten(2).transpose(1, 2)
        projected: Tensor = self.project(self.norm(pooled))
        return projected.type_as(seen)
