"""What HiDe-LLaVA and DISCO share: a low-rank pair for each task, an anchor of frozen features for each task,
and, when all of them answer, the weights of the tasks for a sample.

Anchors are true means over the samples of a task that have the view, reduced over ranks, in float64
(`TaskKeyMemory`): one more pass over the task's examples when its stage is finished, towers only. The
released code starts them at random vectors, keeps them per rank and in bf16 counters, and takes a maximum
over the batch (traps T3 to T5 of specification 7): none of that is done here, and only trained tasks weigh.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer, RowPlan, mixed
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.features.task_keys import TaskKeyMemory
from delo_llava.methods._lowrank import LowRankMethod
from delo_llava.methods._routed import RoutedMethod, RoutedOptions
from delo_llava.methods.base import Footprint, Passes, Past, Reduce, Stage


class SlotOptions(RoutedOptions):
    """Options of methods with a slot for each task.

    Attributes:
        temperature: of the softmax over the tasks' similarities.
        views: the evidence for a task; the similarity is the mean cosine over those that a sample has.
    """

    temperature: float = Field(0.1, gt=0)
    views: tuple[Literal["image", "text", "instruction"], ...] = ("image", "instruction")


class SlotMethod(RoutedMethod):
    """One adapter per task, trained alone: y = W₀x + s·B_t A_t x."""

    Config = SlotOptions
    _anchors: TaskKeyMemory

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._task = stage.name
        self._anchors = TaskKeyMemory(self.width(base), covariance=False)
        return self.fresh(base, stage.name)  # type: ignore[no-any-return]

    # In training one pair acts on every row: nothing is decided.
    loss_sums = LowRankMethod.loss_sums

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        self.anchor(self._anchors, self._task, model, passes, reduce)

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        self._anchors.save_task(folder, stage.name)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        self._anchors = TaskKeyMemory(self.width(base), covariance=False)
        self._anchors.load({name: stage.folder for name, stage in past.items()})
        return mixed(self.opened(base, past), self.mix, self.weigh)  # type: ignore[no-any-return]

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """What a linear adds when all tasks' pairs answer."""
        return expanded(layer, x)

    def weigh(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        """softmax(mean cosine to the anchors / τ), B×T; a sample without evidence weighs all tasks alike."""
        tasks = tuple(self._anchors.tasks)
        _, scores = self._anchors.choose(queries, inputs.presence, tasks, "cosine", self.options.views)
        weights = (scores / self.options.temperature).softmax(-1).float()
        return RowPlan({"tasks": weights}, inputs)

    def footprint(self, base: nn.Module) -> Footprint:
        config = self.config(base)
        trained = config.r * sum(map(sum, self.placed(base).values()))
        stored = 8 * 3 * (1 + self.width(base))
        return Footprint(trained, "lora", config.r, stored, every_task=True)


def expanded(layer: LowRankLayer, x: Tensor) -> Tensor:
    """s·Σ_i w_i B_i A_i x, each row by its own weights of the tasks."""
    plan: RowPlan = layer.carrier.current()
    weights = plan.at(layer, "tasks", x)
    total: Any = 0
    for i, name in enumerate(layer.active_adapters):
        total = total + layer.up(name, layer.down(name, x) * weights[..., i : i + 1])
    return total  # type: ignore[no-any-return]


def fused(layer: LowRankLayer, x: Tensor, cross_terms: bool) -> Tensor:
    """s·Σ_j B_j A_j x, or with the cross terms s·(Σ_j B_j)(Σ_i A_i) x."""
    names = layer.active_adapters
    narrow = [layer.down(name, x) for name in names]
    if cross_terms:
        summed = torch.stack(narrow).sum(0)
        narrow = [summed] * len(names)
    wide = [layer.up(name, u) for name, u in zip(names, narrow, strict=True)]
    return torch.stack(wide).sum(0)
