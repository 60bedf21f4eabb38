"""`joint_small`: one LoRA on all tasks together, in one stage."""

from delo_llava.methods.base import StagePlan
from delo_llava.methods.lora import Lora
from delo_llava.tasks import TaskSequence


class Joint(Lora):
    """The only stage is called `all`."""

    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        return (StagePlan("all", tuple(sequence.names)),)


METHOD = Joint
