"""`individual`: a fresh PEFT LoRA per task, the true task given at test: the upper bound."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from peft import LoraConfig, PeftModel
from torch import nn

from delo_llava.adapters.store import open_adapters
from delo_llava.data.collate import Batch
from delo_llava.errors import DeloError
from delo_llava.methods._lora import LoraMethod, bare, no_grad_parameters
from delo_llava.methods.base import Capabilities, Past, Prompt, Stage


class Individual(LoraMethod):
    """One LoRA per task; the harness must name the task of every sample."""

    capabilities = Capabilities(needs_task=True, isolated=True)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        return self.fresh(base)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return bare(base)
        folders = {name: stage.folder for name, stage in past.items()}
        return no_grad_parameters(open_adapters(base, folders, LoraConfig))

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        if isinstance(model, PeftModel):
            wanted = set(tasks or ())
            if len(wanted) != 1:
                raise DeloError(
                    "`individual` answers one task at a time",
                    given=sorted(wanted) or "no task",
                    fix="evaluate with the true task and one task per batch",
                )
            model.set_adapter(wanted.pop(), inference_mode=True)
        yield Prompt.of(batch)


METHOD = Individual
