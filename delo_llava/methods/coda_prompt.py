"""`coda_prompt`: prompts mixed from components by attention; every task adds components, earlier ones stay.

Source: Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free
Continual Learning", CVPR 2023 (arXiv 2211.13218), eqs. 3–7; the mapping is section 12 of the specification of
newer methods.

    prefix of a row at a layer = Σ_m cos(q ⊙ A_m, K_m) P_m        over the components of all tasks so far
    L = CE + λ · Σ over P, K, A and layers of mean((B Bᵀ − I)²),   B the rows of all tasks, earlier ones fixed

q is the row's queries side by side, a missing view zero. needs_task: no · encoders: none beside the base's
own · mergeable: no · per task: n components, 4·n·layers·(2·heads·length·width + 2·3d) bytes. `faithful` but
for the query. The number of tasks need not be known: each has n components; the paper deals out a pool of M.

Not reproduced: components of later tasks that stay zero, and so without gradient; earlier rows that weight
decay moves (they are in no optimiser here); unused rows where tasks do not divide the pool.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.data.collate import Batch
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._components import fresh_components, mixed_prompts
from delo_llava.methods._prompts import Layout, PromptMethod, PromptOptions, PromptPlan, Tensors
from delo_llava.methods._size import Matched, matched_count
from delo_llava.methods.base import Clock

POOL = "components"


class CodaPromptOptions(PromptOptions):
    """Options of CODA-Prompt.

    Attributes:
        components: that a task adds [M / T], or `match`: as many as come nearest to what a stage of `like`
            trains.
        like: a method's name, for `match`.
        length: keys and values of a prompt at each layer (the paper's length 8 is 4 keys and 4 values).
        depth: share of the layers, from the first, that have prompts (the paper's 5 of 12).
        ortho: weight of the orthogonality term [λ]; 0 leaves it to the orthogonal start.
    """

    components: Matched = 10
    like: str = "delo"
    length: int = Field(4, ge=1)
    depth: float = Field(5 / 12, gt=0, le=1)
    ortho: float = Field(0.0, ge=0)


class CodaPrompt(PromptMethod):
    """A frozen base and a pool of components that grows by task."""

    Config = CodaPromptOptions
    growing = (POOL,)

    def draw(self, base: nn.Module, earlier: Mapping[str, Tensors]) -> dict[str, Tensors]:
        layout, width = self._layout(base), 3 * self.width(base)
        count = self.options.components
        if count == "match":
            each = layout.numel + 2 * layout.layers * width
            count = matched_count(self.options.like, base, self.backbone, self.run, each)
        return {POOL: fresh_components(count, layout.shape, width, earlier.get(POOL))}

    def plan(
        self, base: nn.Module, held: Mapping[str, Tensors], inputs: RouteInputs, queries: Queries
    ) -> PromptPlan:
        pool = held[POOL]
        prompts = mixed_prompts(F.normalize(torch.cat(list(queries), 1), dim=1), pool)
        terms = (
            {"ortho": torch.stack([overlap(rows) for rows in pool.values()])} if self.options.ortho else {}
        )
        return PromptPlan(*self._layout(base).prefixes(prompts), terms)

    def counts(self, batch: Batch) -> dict[str, float]:
        term = {"ortho": 0.0 if batch.filler else 1.0} if self.options.ortho else {}
        return super().counts(batch) | term

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | ({"ortho": self.options.ortho} if self.options.ortho else {})

    def _layout(self, base: nn.Module) -> Layout:
        return Layout.of(base, self.options.length, self.options.depth)


def overlap(rows: Tensor) -> Tensor:
    """Σ over layers of mean((B Bᵀ − I)²), B n×d of rows n×layers×…."""
    flat = rows.flatten(2).transpose(0, 1)
    identity = torch.eye(flat.shape[1], device=rows.device)
    return (flat @ flat.transpose(1, 2) - identity).square().mean((1, 2)).sum()


METHOD = CodaPrompt
