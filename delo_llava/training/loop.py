"""The steps of one stage: the same arithmetic for every engine, rank count and accumulation."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from typing import Any, Protocol

import torch
from torch import Tensor

from delo_llava.config import TrainConfig
from delo_llava.data.collate import Batch
from delo_llava.data.omitted import CutRecords
from delo_llava.engines import signals
from delo_llava.engines.base import Engine
from delo_llava.engines.module import MethodModule
from delo_llava.engines.optim import cosine_with_warmup, rates, set_rates
from delo_llava.engines.ranks import Ranks, as_fault
from delo_llava.methods.base import Clock, Method, Trained, overrides
from delo_llava.training.guards import judge_nonfinite, require_trained_tokens


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
class Ledger:
    """What a stage's steps leave for the run's record; it travels with the step checkpoints.

    Attributes:
        first, last: the learning rates that really applied, by group.
        skipped: steps left out because loss or gradient was not finite, with the records at fault.
        bad_images: records left out because their image cannot be read -> why.
        cut: records whose prompt was cut; both are this rank's own until they are `gathered`.
        seconds: spent in this stage before the checkpoint.
        resumed: steps at which a launch went on.
    """

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    bad_images: dict[str, str] = field(default_factory=dict)
    cut: CutRecords = field(default_factory=CutRecords)
    seconds: float = 0.0
    resumed: list[int] = field(default_factory=list)

    def gathered(self, ranks: Ranks) -> "Ledger":
        """With what every rank left out, on every rank."""
        cut = CutRecords().union(ranks.each(self.cut))
        return replace(self, bad_images=ranks.union(self.bad_images), cut=cut)


class Observer(Protocol):
    """What the loop tells the stage that runs it; the same calls on every rank."""

    def step(self, report: StepReport) -> None:
        """A step was done."""

    def skipped(self, step: int, record_ids: list[str]) -> None:
        """A step was left out."""

    def save(self, step: int) -> None:
        """Store the stage as it stands before `step`."""


def run_steps(
    engine: Engine,
    module: MethodModule,
    batches: Iterable[list[Batch]],
    clock: Callable[[int], Clock],
    train: TrainConfig,
    ranks: Ranks,
    observer: Observer,
    *,
    start: int = 0,
    ledger: Ledger | None = None,
    at: Callable[[str], None] = lambda phase: None,
) -> Ledger:
    """Train the global batches from `start` on.

    Args:
        batches: this rank's micro-batches of each global batch, from `start` on.
        clock: where the stage stands at a step.
        at: told what this rank begins to do.

    Raises:
        DeloError: a micro-batch without trained tokens, or a loss or gradient that is not finite; raised on
            every rank.
        Preempted: a rank was asked to leave; the stage is saved.
    """
    ledger = ledger or Ledger()
    steps, source = clock(start).steps, iter(batches)
    began = time.monotonic()
    for step in range(start, steps):
        at(f"before step {step}")
        if ranks.any(signals.requested() is not None):
            if step > start:
                observer.save(step)
            ranks.leave_if_asked(f"training, before step {step}")
        now = clock(step)
        micros, totals = _next(source, module.method, now, ranks)
        for micro in micros:
            ledger.cut.add(micro.cuts)
        if engine.schedules:
            lr = rates(engine.optimizer)
        else:
            lr = set_rates(engine.optimizer, cosine_with_warmup(step, steps, train.warmup))
        terms, norm, faulty = _step(engine, module, micros, totals, now, ranks, at)
        ended = time.monotonic()
        if isfinite(norm):
            weights = module.method.weights(now)
            observer.step(_report(step, terms, weights, lr, norm, totals, ended - began, train))
        else:
            _skip(step, micros, faulty, train, ranks, observer, ledger)
        began = ended
        ledger.first, ledger.last = ledger.first or lr, lr
        if train.save_every and (step + 1) % train.save_every == 0 and step + 1 < steps:
            observer.save(step + 1)
    return ledger


def _report(
    step: int,
    terms: dict[str, float],
    weights: dict[str, float],
    lr: dict[str, float],
    norm: float,
    totals: dict[str, float],
    seconds: float,
    train: TrainConfig,
) -> StepReport:
    return StepReport(
        step=step,
        loss=sum(weights[k] * v for k, v in terms.items()),
        terms=terms,
        lr=lr,
        grad_norm=norm,
        answer_tokens=int(totals["answer"]),
        seconds=seconds,
        samples_per_second=train.global_batch / seconds,
    )


def _step(
    engine: Engine,
    module: MethodModule,
    micros: list[Batch],
    totals: dict[str, float],
    clock: Clock,
    ranks: Ranks,
    at: Callable[[str], None],
) -> tuple[dict[str, float], float, list[str]]:
    """Forward and backward of every micro-batch, then the update with the method's hooks around it.

    Returns:
        the terms' means; the gradient norm, which is not finite where nothing was updated; and this rank's
        records whose loss is not finite.
    """
    method, names = module.method, sorted(totals)
    weights, faulty = method.weights(clock), list[str]()
    summed = torch.zeros(len(names), dtype=torch.float64)
    norm = 0.0
    for number, micro in enumerate(micros, 1):
        at(f"training step {clock.step} on records {', '.join(micro.record_ids)}")
        batch = micro.to(ranks.device)
        sums = engine.forward(batch)
        loss = _weighted(sums, weights, totals)
        finite = bool(loss.detach().isfinite())
        if not finite:
            # An infinite loss may have a finite gradient on this rank, and the others cannot know. Every
            # engine leaves an update out, on all ranks, when the gradient is not finite: so make it that.
            loss = loss * nan
            faulty += micro.record_ids
        summed += torch.tensor(
            [float(sums[name].detach()) if name in sums else 0.0 for name in names], dtype=torch.float64
        )
        engine.backward(loss)
        if finite and not micro.filler:
            method.after_backward(module.model, batch, clock)
        if number < len(micros):
            engine.step()
    penalties, norm = _update(engine, method, weights, clock)
    if not isfinite(norm):
        method.left_out(clock)
    whole = ranks.sum(summed).tolist()
    means = {name: value / max(totals[name], 1.0) for name, value in zip(names, whole, strict=True)}
    return means | penalties, norm, faulty


def _update(
    engine: Engine, method: Method, weights: dict[str, float], clock: Clock
) -> tuple[dict[str, float], float]:
    """The update after the last backward pass; what a method's hooks need is gathered only for those it has.

    Returns:
        the value of each penalty, and the gradient norm.
    """
    told: dict[str, float] = {}
    if overrides(method, "penalties"):
        told = _penalise(engine.trained, method, weights, clock)
    if overrides(method, "before_step"):
        method.before_step(engine.trained, clock)
    before = engine.trained.values() if overrides(method, "after_step") else {}
    norm = engine.step() or 0.0
    if before and isfinite(norm):
        method.after_step(engine.trained, before, clock)
    return told, norm


def _penalise(trained: Trained, method: Method, weights: dict[str, float], clock: Clock) -> dict[str, float]:
    """Add the gradient of the weighted penalties; they are the same on every rank, so each adds it once."""
    values = {name: value.requires_grad_() for name, value in trained.values().items()}
    with torch.enable_grad():
        terms = method.penalties(values, clock)
        if not terms:
            return {}
        total: Any = sum(weights[name] * value for name, value in terms.items())
        gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    found = {name: g for name, g in zip(values, gradients, strict=True) if g is not None}
    trained.add_gradients(found)
    return {name: float(value.detach()) for name, value in terms.items()}


def _skip(
    step: int,
    micros: list[Batch],
    faulty: list[str],
    train: TrainConfig,
    ranks: Ranks,
    observer: Observer,
    ledger: Ledger,
) -> None:
    """Record a step that was left out.

    Raises:
        DeloError: the run's policy is to stop, or there were too many.
    """
    found = [name for ids in ranks.each(faulty) for name in ids]
    everything = [i for ids in ranks.each([i for m in micros for i in m.record_ids]) for i in ids]
    records = found or everything
    ledger.skipped.append({"step": step, "records": records})
    observer.skipped(step, records)
    judge_nonfinite(train, step, records, len(ledger.skipped))


def _weighted(sums: dict[str, Tensor], weights: dict[str, float], totals: dict[str, float]) -> Tensor:
    """Σ_k weight_k · sum_k / total_k of one micro-batch."""
    parts: list[Any] = [weights[name] * value / max(totals[name], 1.0) for name, value in sums.items()]
    total: Tensor = sum(parts[1:], start=parts[0])
    return total


def _next(
    source: Iterator[list[Batch]], method: Method, clock: Clock, ranks: Ranks
) -> tuple[list[Batch], dict[str, float]]:
    """This rank's micro-batches of a step, and how many items each loss term averages over on all ranks.

    Raises:
        DeloError: on every rank, before anything is reduced: a rank has no batch to train on.
    """
    micros, fault = list[Batch](), None
    names = sorted(method.weights(clock))
    own = dict.fromkeys(names, 0.0)
    try:
        micros = next(source)
        for batch in micros:
            count = method.counts(batch)
            if not batch.filler:
                require_trained_tokens(count, batch.record_ids)
            own = {name: own[name] + count.get(name, 0.0) for name in names}
    except Exception as error:
        if ranks.world == 1:
            raise
        fault = as_fault(error)
    told = torch.tensor([*own.values(), float(fault is not None)], dtype=torch.float64)
    *totals, faults = ranks.sum(told).tolist()
    if faults:
        ranks.agree(fault)
    return micros, dict(zip(names, totals, strict=True))
