"""`zero_small`: the bare base; no stage is trained."""

from delo_llava.methods.base import StagePlan
from delo_llava.methods.lora import Lora
from delo_llava.tasks import TaskSequence


class Zero(Lora):
    """Of `lora` only what answers without any stage is used."""

    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        return ()


METHOD = Zero
