"""`lora`: one PEFT LoRA trained through all tasks in turn: the lower bound."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import nn

from delo_llava.data.collate import Batch
from delo_llava.experts.own import require_own_adapter
from delo_llava.methods._lora import LoraMethod, bare, no_grad_parameters
from delo_llava.methods.base import Capabilities, Stage


class Lora(LoraMethod):
    """Sequential LoRA: stage t goes on from the adapter of stage t-1; nothing is told the task."""

    capabilities = Capabilities()

    def begin_task(self, base: nn.Module, stage: Stage) -> nn.Module:
        if not stage.earlier:
            return self.fresh(base)
        return PeftModel.from_pretrained(base, _last(stage.earlier), is_trainable=True)

    def load(self, base: nn.Module, adapters: dict[str, Path]) -> nn.Module:
        if not adapters:
            return bare(base)
        return no_grad_parameters(PeftModel.from_pretrained(base, _last(adapters)))

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[None]:
        yield


def _last(adapters: dict[str, Path]) -> Path:
    return require_own_adapter(list(adapters.values())[-1], LoraConfig)


METHOD = Lora
