"""`l2p`: one pool of prompts for all tasks, of which every sample reads those whose keys are nearest.

Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022 (arXiv 2112.08654), eqs. 3–5; the
mapping is section 12 of the specification of newer methods.

    s_i = mean over a sample's views v of cos(q_v, k_iv),   chosen = the N largest s_i
    prefix of a row = [P_i : i chosen],   L = CE + λ · mean over samples of Σ_{i chosen} (1 − s_i)

needs_task: no · encoders: a CLIP by `encoder=FOLDER`, else the base's own · mergeable: no (the prefix
depends on the input) · per task: nothing, the pool is of one size; a stage's folder holds all of it,
4·M·(layers·2·heads·length·width + 3d) bytes. `simplified`: prompts are keys and values at every layer
instead of embeddings in front of the sequence (which would move positions), and the query has a part for
every view of a sample, so that a missing one says nothing.

Not reproduced: the released code's choice by a vote over the batch (`transductive` has it, and is marked so);
the weight decay and stale moments that move prompts which no sample of a task reads.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._prompts import (
    Layout,
    PromptMethod,
    PromptOptions,
    PromptPlan,
    Tensors,
    mean_cosine,
    side_by_side,
    unit_keys,
)
from delo_llava.methods._size import Matched, matched_count
from delo_llava.methods.base import Clock

POOL = "pool"


class L2pOptions(PromptOptions):
    """Options of L2P; symbols of the paper in brackets.

    Attributes:
        pool_size: prompts in the pool [M], or `match`: as many as come nearest to what a stage of `like`
            trains.
        like: a method's name, for `match`.
        chosen: prompts that a sample reads [N].
        length: keys and values of a prompt at each layer [L_p].
        depth: share of the layers, from the first, that have prompts.
        pull: weight of the term that draws chosen keys to the queries [λ]; keys learn from nothing else.
        transductive: every row of a batch reads the prompts that most rows would choose, as the released
            code does; answers then depend on a sample's company.
    """

    pool_size: Matched = 10
    like: str = "delo"
    chosen: int = Field(5, ge=1)
    length: int = Field(5, ge=1)
    depth: float = Field(1.0, gt=0, le=1)
    pull: float = Field(0.5, gt=0)
    transductive: bool = False

    @model_validator(mode="after")
    def _choice_fits_pool(self) -> "L2pOptions":
        if self.pool_size != "match" and self.pool_size < self.chosen:
            raise ValueError(f"chosen {self.chosen} is larger than pool_size {self.pool_size}; choose fewer")
        return self


class L2p(PromptMethod):
    """A frozen base and one pool that all tasks train in turn."""

    Config = L2pOptions

    def __init__(self, options: L2pOptions, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.capabilities = replace(self.capabilities, transductive=options.transductive)

    def draw(self, base: nn.Module, earlier: Mapping[str, Tensors]) -> dict[str, Tensors]:
        layout, width = self._layout(base), self.width(base)
        size = self.options.pool_size
        if size == "match":
            each = layout.numel + 3 * width
            size = matched_count(self.options.like, base, self.backbone, self.run, each)
            size = max(size, self.options.chosen)
        return {POOL: {"prompts": layout.draw(size), "keys": unit_keys(size, width)}}

    def plan(
        self, base: nn.Module, held: Mapping[str, Tensors], inputs: RouteInputs, queries: Queries
    ) -> PromptPlan:
        prompts, scores = held[POOL]["prompts"], mean_cosine(queries, held[POOL]["keys"])
        chosen = nearest(scores, self.options.chosen, self.options.transductive)
        keys, values = self._layout(base).prefixes(side_by_side(prompts[chosen]))
        return PromptPlan(keys, values, {"pull": (1 - scores.gather(1, chosen)).sum(1).float()})

    def counts(self, batch: Batch) -> dict[str, float]:
        return super().counts(batch) | {"pull": 0.0 if batch.filler else float(len(batch))}

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"pull": self.options.pull}

    def _layout(self, base: nn.Module) -> Layout:
        return Layout.of(base, self.options.length, self.options.depth)


def nearest(scores: Tensor, count: int, vote: bool) -> Tensor:
    """The `count` best of each row of R×M scores, int64 R×count; by a `vote`, those that most rows choose (a
    tie goes to the earlier one), for all rows.
    """
    chosen = scores.detach().topk(count, dim=1).indices
    if not vote:
        return chosen
    votes = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
    return votes.sort(descending=True, stable=True).indices[:count].expand(len(scores), -1)


METHOD = L2p
