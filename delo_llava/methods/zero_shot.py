"""`zero_shot`: the bare base answers; nothing is trained.

Specification: baselines. There is no stage; the row of the base is the result, and forgetting and transfer
are not defined. needs_task: no; encoders: none; mergeable: there is nothing to merge; bytes per task: 0.
Faithful.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from delo_llava.errors import DeloError
from delo_llava.methods._lora import bare
from delo_llava.methods.base import Capabilities, Footprint, Method, Past, Stage
from delo_llava.tasks import StagePlan, TaskSequence


class ZeroShot(Method):
    """No stage at all."""

    capabilities = Capabilities(mergeable=True)

    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        return ()

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        return bare(base)

    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        """Never called by a run.

        Raises:
            DeloError: always.
        """
        raise DeloError("`zero_shot` trains nothing that could be saved", given=f"stage {stage.name}")

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        return bare(base)

    def footprint(self, base: nn.Module) -> Footprint:
        return Footprint(0, "lora", 0, 0, every_task=False)


METHOD = ZeroShot
