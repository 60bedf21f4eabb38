"""`joint`: one LoRA trained on all tasks together, in one stage: what a sequence could reach at best.

Specification: baselines, "Joint / multitask" (CoIN's Multitask row). The tasks' records are mixed as they
are, so a task weighs as many records as it has; `train.epochs` counts passes over all of them. With rank
`match` its adapter is as large as that of one stage of another method, not of all stages together.

needs_task: no; encoders: none; mergeable: yes; bytes per task: none beyond the one adapter. Faithful. There
is no second stage, so forgetting and transfer are not defined (docs/results.md).
"""

from delo_llava.methods.base import StagePlan
from delo_llava.methods.lora import Lora
from delo_llava.tasks import TaskSequence

#: Name of the only stage.
STAGE = "joint"


class Joint(Lora):
    """`lora` with one stage of all tasks."""

    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        return (StagePlan(STAGE, tuple(sequence.names)),)


METHOD = Joint
