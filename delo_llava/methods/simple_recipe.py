"""`simple_recipe`: a fresh LoRA per task at a low rate, merged when the task is done: the control that every
table needs.

Source: the recipe of arXiv 2603.14493, as released (specification: newer_methods, section 13).

    W_t = W_{t−1} + s·B_t A_t,   L = CE,   at a peak rate of 2e-5, ten times below what baselines usually use

with L over the task's own records and, by an option, over a few of every earlier task's.

needs_task: no. Encoders: none. mergeable: yes. Bytes per task: 4·r·Σ(d_in + d_out), in a run; nothing once
merged; about 100 per record that is replayed.

Simplified: merging into a 4-bit base would quantise it anew, so earlier tasks are kept as one frozen pair
beside it (the same function); the projector has low-rank pairs as in every other method here, where the
recipe trains it whole. That a low rate alone prevents forgetting is the recipe's claim, to be tested in the
table where this row stands, at this rate and at the method's own (`lr=null`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from delo_llava.config import TrainConfig
from delo_llava.data.examples import Examples
from delo_llava.files import write_json_atomic
from delo_llava.methods._accumulated import AccumulatedMethod
from delo_llava.methods._lowrank import LowRankOptions
from delo_llava.methods.base import Capabilities, Mixture, Part, Stage
from delo_llava.methods.replay import MEMORY, recall_all, remember


class SimpleRecipeOptions(LowRankOptions):
    """Options of the simple recipe.

    Attributes:
        lr: peak rate of all parameters, in place of the run's `train.lr` and `train.projector_lr`; null keeps
            the run's.
        replay: training records of every task that later stages go over once an epoch, as `replay` does; the
            recipe mixes in 20 or none.
    """

    lr: float | None = Field(2e-5, gt=0)
    replay: int = Field(0, ge=0)


class SimpleRecipe(AccumulatedMethod):
    """Plain LoRA, one task after the other, at a rate of its own."""

    capabilities = Capabilities(mergeable=True)
    Config = SimpleRecipeOptions

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        rate = self.options.lr
        if rate is not None:
            train = train.model_copy(update={"lr": rate, "projector_lr": rate})
        return super().groups(model, train)

    def mixture(self, stage: Stage, own: Examples, past: Mapping[str, Examples]) -> Mixture:
        if not self.options.replay:
            return (Part(own),)
        self._memory = remember(own, self.options.replay, self.run.seed)
        memory = recall_all(stage, past)
        return (Part(own), Part(memory)) if len(memory) else (Part(own),)

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        if self.options.replay:
            write_json_atomic(folder / MEMORY, self._memory)


METHOD = SimpleRecipe
