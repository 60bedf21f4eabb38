"""`lwf`: sequential LoRA that keeps saying on new records what it said before the stage.

Source: Li and Hoiem, Learning without Forgetting, ECCV 2016, equation 2, for the next token. Specification:
baselines, "LwF"; newer_methods, section 14.

    L = CE + λ · T² · mean over answer tokens of KL(p ‖ q),   p = softmax(teacher/T), q = softmax(student/T)

The teacher is the model as it stood before the stage: the adapter of the stage before, frozen beside the one
that is trained on from it, on the same frozen base. It sees the current stage's records and nothing else; the
first stage has no teacher. It costs one more forward pass, without dropout and gradient.

needs_task: no; encoders: none; mergeable: yes; bytes per task: none beside the adapter, of which the last one
is the teacher. Simplified: answers have no head of their own for each task, so the old outputs are those of
the whole vocabulary on the new task's answer tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, mixed, summed
from delo_llava.adapters.store import open_adapters
from delo_llava.data.collate import Batch
from delo_llava.methods._lora import bare
from delo_llava.methods._lowrank import ADAPTER, LowRankMethod, LowRankOptions, activate
from delo_llava.methods.base import Capabilities, Clock, Past, Stage, answer_logits, answer_loss_sum

#: Name of the frozen adapter.
TEACHER = "teacher"


class LwfOptions(LowRankOptions):
    """Options of LwF.

    Attributes:
        strength: λ.
        temperature: T, of teacher and student alike.
    """

    strength: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)


class Lwf(LowRankMethod):
    """One adapter, distilled from what it was."""

    capabilities = Capabilities(mergeable=True)
    Config = LwfOptions
    #: Whether the stage has a teacher, and whether it is the one that speaks.
    _taught = _teaching = False

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._taught = bool(stage.past)
        if not self._taught:
            first: nn.Module = self.fresh(base, ADAPTER)
            return first
        last = list(stage.past.values())[-1].folder
        model: PeftModel = mixed(
            open_adapters(base, {ADAPTER: last, TEACHER: last}, LowRankConfig), self._mix
        )
        activate(model, [ADAPTER], train=[ADAPTER])
        return model

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        model: nn.Module = self.opened(base, past, only_last=True) if past else bare(base)
        return model

    def counts(self, batch: Batch) -> dict[str, float]:
        told = super().counts(batch)
        return told | {"distill": told["answer"] if self._taught else 0.0}

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"distill": self.options.strength}

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if not self._taught:
            return super().loss_sums(model, batch)
        assert batch.labels is not None
        with self._teacher():
            told = answer_logits(model, batch)
        said = answer_logits(model, batch)
        return {
            "answer": answer_loss_sum(said, batch.labels),
            "distill": distillation_sum(said, told, self.options.temperature),
        }

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        """Let the frozen adapter speak, without gradient."""
        self._teaching = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._teaching = False

    def _mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """The teacher's update, without dropout, or the student's."""
        if not self._teaching:
            return summed(layer, x)
        return layer.up(TEACHER, layer.lowrank_A[TEACHER](x.to(torch.float32)))


def distillation_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² Σ_n KL(softmax(teacher_n/T) ‖ softmax(student_n/T)) over N×V logits, in nats."""
    p, q = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * nn.functional.kl_div(q, p, reduction="sum", log_target=True)


METHOD = Lwf
