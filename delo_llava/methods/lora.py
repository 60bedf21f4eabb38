"""`lora`: one PEFT LoRA trained through all tasks in turn: the lower bound."""

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from torch import nn

from delo_llava.adapters.store import open_adapters
from delo_llava.methods._lora import LoraMethod, bare, no_grad_parameters
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods.base import Capabilities, Past, Stage


class Lora(LoraMethod):
    """Sequential LoRA: stage t goes on from the adapter of stage t-1; nothing is told the task."""

    capabilities = Capabilities(mergeable=True)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        if not stage.past:
            return self.fresh(base)
        return open_adapters(base, _last(stage.past), LoraConfig, trainable=True)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return bare(base)
        return no_grad_parameters(open_adapters(base, _last(past), LoraConfig))


def _last(past: Mapping[str, Past]) -> dict[str, Path]:
    """The last stage's folder, under the name that PEFT gives the only adapter."""
    return {ADAPTER: list(past.values())[-1].folder}


METHOD = Lora
