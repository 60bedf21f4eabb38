"""`ewc_small`: sequential LoRA with an EWC penalty whose Fisher information is taken when a stage is
finished."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delo_llava.methods._lowrank import LowRankOptions
from delo_llava.methods.base import Clock, Passes, Reduce, Stage
from delo_llava.methods.lora import Lora

FISHER = "fisher.safetensors"


class Options(LowRankOptions):
    """Attributes:
    strength: λ of the penalty.
    samples: whose squared gradients make the Fisher information.
    """

    strength: float = Field(10.0, ge=0)
    samples: int = Field(8, ge=1)


class Ewc(Lora):
    """L = CE + λ/2 Σ F (θ − θ*)², F and θ* of the stage before."""

    Config = Options

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        last = list(stage.past.values())[-1:]
        self._past = load_file(last[0].folder / FISHER) if last else {}
        return super().begin(base, stage)

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"ewc": self.options.strength}

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        if not self._past:
            return {}
        terms = [
            (
                self._past[f"fisher/{name}"].to(value) * (value - self._past[f"anchor/{name}"].to(value)) ** 2
            ).sum()
            for name, value in values.items()
        ]
        return {"ewc": torch.stack(terms).sum() / 2}

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        model.eval()
        for batch in passes.drawn(self.options.samples, size=1):
            count = max(1.0, self.counts(batch)["answer"])
            loss = self.loss_sums(model, batch)["answer"] / count
            for name, gradient in zip(
                named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    sums[name] += gradient.double() ** 2
        fisher = {f"fisher/{name}": (reduce(s) / self.options.samples).float() for name, s in sums.items()}
        anchors = {f"anchor/{name}": p.detach().clone() for name, p in named.items()}
        self._past = {name: tensor.cpu() for name, tensor in (fisher | anchors).items()}

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        save_file(self._past, folder / FISHER)


METHOD = Ewc
