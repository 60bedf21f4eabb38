"""`dualprompt`: a general prompt for all tasks and an expert prompt for each, found by its key.

Source: Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022
(arXiv 2204.04799), eqs. 3–6; the mapping is section 12 of the specification of newer methods.

    general prefix G at the first layers, expert prefix E_t at those behind them
    training on task t: G, E_t, k_t with  L = CE + λ · mean over samples of (1 − s_t)
    answering: t = argmax_τ s_τ,   s_τ = mean over a sample's views v of cos(q_v, k_τv), per sample

needs_task: no (the choice is per sample; `oracle` answers as the true task) · encoders: none beside the
base's own · mergeable: no · per task: E_t and k_t, and a copy of G, 4·(layers·2·heads·length·width of both +
3d) bytes. `faithful` but for two things: k_t starts at the mean query of some samples of the task, and a
query has a part for every view, so that a missing one says nothing.

Not reproduced: ports that mix the key/value and the sample axis of a batch of prompts; batch-wise matching.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.data.collate import Batch
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.methods._prompts import (
    Layout,
    PromptMethod,
    PromptOptions,
    PromptPlan,
    Prompts,
    Tensors,
    mean_cosine,
    present,
    prompts_of,
    unit_keys,
)
from delo_llava.methods.base import Capabilities, Clock, Passes, Reduce, TaskChoice

GENERAL, EXPERT = "general", "expert"


class DualPromptOptions(PromptOptions):
    """Options of DualPrompt.

    Attributes:
        general_length: keys and values of the general prompt at each of its layers.
        general_depth: share of the layers, from the first, that read the general prompt.
        expert_length: keys and values of an expert prompt at each of its layers.
        expert_depth: share of the layers, behind those, that read the expert prompt.
        pull: weight of the term that draws a task's key to its queries [λ].
        key_samples: samples whose mean query a task's key starts from.
    """

    general_length: int = Field(5, ge=1)
    general_depth: float = Field(1 / 6, gt=0, lt=1)
    expert_length: int = Field(5, ge=1)
    expert_depth: float = Field(1 / 4, gt=0, lt=1)
    pull: float = Field(1.0, gt=0)
    key_samples: int = Field(64, ge=1)


class DualPrompt(PromptMethod):
    """A frozen base, one general prompt trained through all tasks, one expert prompt and key per task."""

    capabilities = Capabilities(chooses_task=True, starts_as_base=False)
    Config = DualPromptOptions
    growing = (EXPERT,)

    def draw(self, base: nn.Module, earlier: Mapping[str, Tensors]) -> dict[str, Tensors]:
        general, expert = self._layouts(base)
        keys = unit_keys(1, self.width(base))
        return {GENERAL: {"prompts": general.draw(1)}, EXPERT: {"prompts": expert.draw(1), "keys": keys}}

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Start the task's key at the mean query, view by view (zero for a view that no sample has)."""
        key = prompts_of(model).trained[EXPERT].keys
        assert isinstance(key, nn.Parameter)
        total = torch.zeros(key.shape[1:], dtype=torch.float64)
        for batch in passes.drawn(self.options.key_samples):
            queries = frozen_queries(model, self.inputs(batch), batch.inputs)
            total += torch.stack(list(present(queries, batch.presence)), 1).double().sum(0).cpu()
        with torch.no_grad():
            key.copy_(F.normalize(reduce(total), dim=-1).float()[None])

    def plan(
        self, base: nn.Module, held: Mapping[str, Tensors], inputs: RouteInputs, queries: Queries
    ) -> PromptPlan:
        scores = mean_cosine(queries, held[EXPERT]["keys"])
        tasks = told_or_found(prompts_of(base), inputs, scores)
        general = held[GENERAL]["prompts"]
        prompts = general.expand(len(tasks), *general.shape[1:]), held[EXPERT]["prompts"][tasks]
        (keys, values), (expert_keys, expert_values) = (
            layout.prefixes(prompt) for layout, prompt in zip(self._layouts(base), prompts, strict=True)
        )
        pull = (1 - scores.gather(1, tasks.unsqueeze(1))).squeeze(1).float()
        return PromptPlan(keys | expert_keys, values | expert_values, {"pull": pull})

    def counts(self, batch: Batch) -> dict[str, float]:
        return super().counts(batch) | {"pull": 0.0 if batch.filler else float(len(batch))}

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"pull": self.options.pull}

    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        """Per sample, by the nearest key; ties go to the earlier task, −1 where a sample has no such view."""
        prompts, inputs = prompts_of(model), self.inputs(batch)
        queries = present(frozen_queries(model, inputs, batch.inputs), batch.presence)
        wanted = Queries(
            *(q if name in (views or VIEWS) else q * 0 for name, q in zip(VIEWS, queries, strict=True))
        )
        with torch.no_grad():
            scores = mean_cosine(wanted, prompts()[EXPERT]["keys"])
        seen = torch.cat(wanted, 1).any(1)
        return TaskChoice(prompts.stages, torch.where(seen, scores.argmax(1), -1), scores)

    def _layouts(self, base: nn.Module) -> tuple[Layout, Layout]:
        given = self.options
        general = Layout.of(base, given.general_length, given.general_depth)
        return general, Layout.of(base, given.expert_length, given.expert_depth, after=general.layers)


def told_or_found(prompts: Prompts, inputs: RouteInputs, scores: Tensor) -> Tensor:
    """The place of every row's task, int64 R: as told; the one that is trained; or the one of the best score.

    Raises:
        DeloError: a task has no expert prompt.
    """
    stages, tasks = prompts.stages, inputs.tasks
    if tasks is None:
        found = scores.detach().argmax(1)
        return torch.full_like(found, len(stages) - 1) if len(prompts.trained) else found
    names = [tasks] * len(scores) if isinstance(tasks, str) else list(tasks)
    unknown = sorted(set(names) - set(stages))
    if unknown:
        raise DeloError("No expert prompt for this task", given=unknown, allowed=list(stages))
    return torch.tensor([stages.index(name) for name in names], device=scores.device)


METHOD = DualPrompt
