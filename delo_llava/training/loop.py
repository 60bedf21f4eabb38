"""The steps of one stage: the same arithmetic for every engine, rank count and accumulation."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from delo_llava.config import TrainConfig
from delo_llava.data.collate import Batch
from delo_llava.methods.base import Method
from delo_llava.training.engine import Engine
from delo_llava.training.guards import require_finite, require_trained_tokens
from delo_llava.training.module import MethodModule
from delo_llava.training.optim import cosine_with_warmup, rates, set_rates
from delo_llava.training.ranks import Ranks


@dataclass
class StepReport:
    """One optimiser step, the same on every rank.

    Attributes:
        loss: Σ_k weight_k · mean_k over the global batch.
        terms: mean_k of every loss term.
        lr: the rate of each parameter group during this step.
        grad_norm: global, before clipping.
        answer_tokens: trained tokens of the global batch.
    """

    step: int
    loss: float
    terms: dict[str, float]
    lr: dict[str, float]
    grad_norm: float
    answer_tokens: int
    seconds: float
    samples_per_second: float


@dataclass
class StageRates:
    """The learning rates that really applied, for the run's record."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


def run_steps(
    engine: Engine,
    module: MethodModule,
    batches: Iterable[list[Batch]],
    steps: int,
    train: TrainConfig,
    ranks: Ranks,
    report: Callable[[StepReport], None],
) -> StageRates:
    """Train `steps` global batches; each element of `batches` is this rank's micro-batches of one of them.

    Raises:
        DeloError: a micro-batch without trained tokens, or a loss or gradient that is not finite.
    """
    applied = StageRates()
    began = time.monotonic()
    for step, micros in enumerate(batches):
        ranks.leave_if_asked(f"training, before step {step}")
        totals = _totals(module.method, micros, ranks)
        if engine.schedules:
            lr = rates(engine.optimizer)
        else:
            lr = set_rates(engine.optimizer, cosine_with_warmup(step, steps, train.warmup))
        terms, norm = _step(engine, module, micros, totals, step, ranks)
        weights = module.method.weights()
        now = time.monotonic()
        report(
            StepReport(
                step=step,
                loss=sum(weights[k] * v for k, v in terms.items()),
                terms=terms,
                lr=lr,
                grad_norm=norm,
                answer_tokens=int(totals["answer"]),
                seconds=now - began,
                samples_per_second=train.global_batch / (now - began),
            )
        )
        began = now
        applied.first, applied.last = applied.first or lr, lr
    return applied


def _step(
    engine: Engine,
    module: MethodModule,
    micros: list[Batch],
    totals: dict[str, float],
    step: int,
    ranks: Ranks,
) -> tuple[dict[str, float], float]:
    """Forward and backward of every micro-batch, then the update; returns the terms' means and the norm."""
    method, names = module.method, sorted(totals)
    weights = method.weights()
    summed = torch.zeros(len(names), dtype=torch.float64)
    norm: float | None = None
    for micro in micros:
        batch = micro.to(ranks.device)
        sums = engine.forward(batch)
        loss = _weighted(sums, weights, totals)
        require_finite(loss.detach(), step, micro.record_ids)
        summed += torch.tensor(
            [float(sums[name].detach()) if name in sums else 0.0 for name in names], dtype=torch.float64
        )
        engine.backward(loss)
        method.after_backward(module.model, batch)
        norm = engine.step()
    require_finite(norm if norm is not None else 0.0, step, [i for micro in micros for i in micro.record_ids])
    whole = ranks.sum(summed).tolist()
    return {name: value / max(totals[name], 1.0) for name, value in zip(names, whole, strict=True)}, float(
        norm or 0.0
    )


def _weighted(sums: dict[str, Tensor], weights: dict[str, float], totals: dict[str, float]) -> Tensor:
    """Σ_k weight_k · sum_k / total_k of one micro-batch."""
    parts: list[Any] = [weights[name] * value / max(totals[name], 1.0) for name, value in sums.items()]
    total: Tensor = sum(parts[1:], start=parts[0])
    return total


def _totals(method: Method, micros: list[Batch], ranks: Ranks) -> dict[str, float]:
    """How many items each loss term averages over in the whole global batch."""
    counts = [method.counts(batch) for batch in micros]
    for batch, count in zip(micros, counts, strict=True):
        require_trained_tokens(count, batch.record_ids)
    names = sorted(method.weights())
    own = torch.tensor([sum(count.get(name, 0.0) for count in counts) for name in names], dtype=torch.float64)
    return dict(zip(names, ranks.sum(own).tolist(), strict=True))
