"""`ewc`: sequential LoRA held near what earlier tasks need, by the diagonal of the Fisher information.

Source: Kirkpatrick et al., PNAS 2017, equation 3; the running form: Schwarz et al., ICML 2018, section 3.
Specification: baselines, "EWC"; newer_methods, section 14.

    L = CE + λ/2 Σ_j Σ_i F_i^j (θ_i − θ_i^j)²      `per_task`: over earlier stages j
    L = CE + λ/2 Σ_i F_i (θ_i − θ_i*)²             `online`: F = Σ_j γ^(t−1−j) F^j, θ* of the last stage

over all trained (adapter) weights. F^j is taken when stage j is closed, from its own records and the weights
it ends with: F = mean over records of (∂ℓ/∂θ)², each record alone, ℓ its mean cross-entropy over answer
tokens (the empirical Fisher information). θ^j is the published adapter of stage j. Both forms are one
quadratic, so a stage holds two tensors per weight whatever t is: Σ_j F^j (θ − θ^j)² = F(θ − m)² + constant,
with F = Σ_j F^j and m = Σ_j F^j θ^j / F; the logged penalty lacks that constant.

needs_task: no; encoders: none; mergeable: yes; bytes per task: 4 per trained weight (F), beside the adapter.
Faithful. Not reproduced: under ZeRO released code reads `p.grad`, which is None there, so that F is 0 and the
method is plain LoRA; it squares gradients of batch means, whose signs cancel before they are squared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.own import TENSORS
from delo_llava.methods._lowrank import ADAPTER, LowRankOptions
from delo_llava.methods.base import Clock, Footprint, Passes, Past, Reduce, Stage
from delo_llava.methods.lora import Lora
from delo_llava.strict import read_tensors

FISHER = "fisher.safetensors"
Tensors = dict[str, Tensor]


class EwcOptions(LowRankOptions):
    """Options of EWC.

    Attributes:
        strength: λ.
        samples: of the stage's records, whose squared gradients make F.
        accumulate: `per_task`: every earlier stage pulls to its own weights; `online`: their sum pulls to the
            last stage's.
        decay: γ: F of a stage counts less by this factor with every later stage.
    """

    strength: float = Field(5000.0, ge=0)
    samples: int = Field(200, ge=1)
    accumulate: Literal["per_task", "online"] = "per_task"
    decay: float = Field(1.0, gt=0, le=1)


class Ewc(Lora):
    """`lora` with a quadratic penalty."""

    Config = EwcOptions

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._fisher, self._centre = self._quadratic(stage.past)
        return super().begin(base, stage)

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"ewc": self.options.strength}

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        if not self._fisher:
            return {}
        for known in (self._fisher, self._centre):  # once: then they are where the weights are
            known |= {in_file(name): known[in_file(name)].to(value) for name, value in values.items()}
        return {"ewc": penalty({in_file(n): v for n, v in values.items()}, self._fisher, self._centre)}

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """F of this stage's own records."""
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
        count = torch.zeros((), dtype=torch.float64)
        model.eval()
        for batch in passes.drawn(self.options.samples, size=1):
            loss = self.loss_sums(model, batch)["answer"] / max(1.0, self.counts(batch)["answer"])
            # A record without image leaves the projector's weights without a gradient.
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.double() ** 2
            count += 1
        total = float(reduce(count))
        self._own = {in_file(n): (reduce(s) / total).float().cpu() for n, s in sums.items()}

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        save_file(self._own, folder / FISHER)

    def footprint(self, base: nn.Module) -> Footprint:
        found = super().footprint(base)
        return replace(found, stored_bytes=4 * found.parameters)

    def _quadratic(self, past: Mapping[str, Past]) -> tuple[Tensors, Tensors]:
        """F and centre of the penalty after some stages."""
        fishers = [read_tensors(known.folder / FISHER, f"F of {name}") for name, known in past.items()]
        ends = [
            read_tensors(known.folder / TENSORS, f"The adapter of {name}") for name, known in past.items()
        ]
        return quadratic(fishers, ends, self.options.accumulate, self.options.decay)


def quadratic(
    fishers: Sequence[Tensors], ends: Sequence[Tensors], accumulate: str, decay: float
) -> tuple[Tensors, Tensors]:
    """F and m with F(θ − m)² = Σ_j γ^(t−1−j) F^j (θ − θ^j)² up to a constant (`per_task`), or with m = θ of
    the last stage (`online`).

    Args:
        fishers, ends: F^j and θ^j of the earlier stages, fp32; empty ones give empty tensors.
    """
    if not fishers:
        return {}, {}
    powers = [decay ** (len(fishers) - 1 - j) for j in range(len(fishers))]
    total, centre = Tensors(), Tensors()
    for name, last in ends[-1].items():
        weighted = [power * fisher[name].double() for power, fisher in zip(powers, fishers, strict=True)]
        summed = torch.stack(weighted).sum(0)
        pull = torch.stack([f * end[name].double() for f, end in zip(weighted, ends, strict=True)]).sum(0)
        mean = torch.where(summed > 0, pull / summed, last.double())
        total[name] = summed.float()
        centre[name] = mean.float() if accumulate == "per_task" else last
    return total, centre


def penalty(
    values: Mapping[str, Tensor], fisher: Mapping[str, Tensor], centre: Mapping[str, Tensor]
) -> Tensor:
    """½ Σ F (θ − m)², a scalar."""
    terms = [(fisher[name] * (value - centre[name]) ** 2).sum() for name, value in values.items()]
    return torch.stack(terms).sum() / 2


def in_file(name: str) -> str:
    """A trained weight's name as the adapter's file has it: without the adapter's own."""
    head, _, tail = name.rpartition(f".{ADAPTER}.")
    return f"{head}.{tail}"


METHOD = Ewc
