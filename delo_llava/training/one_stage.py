"""One stage: a pure function of the base, the earlier adapters on disk, the task's data and the seed."""

import gc
import random
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from delo_llava.backbones.base import Backbone
from delo_llava.checkpoint.store import RunStore
from delo_llava.config import RunConfig
from delo_llava.data.collate import Collator
from delo_llava.data.sampler import plan_accumulation
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Stage
from delo_llava.tasks import TaskSpec
from delo_llava.training.batches import TaskBatches
from delo_llava.training.engine import Engine, build_engine, zero_stage
from delo_llava.training.guards import fingerprint, frozen_parameters, require_unchanged
from delo_llava.training.logging import MetricsLog, RunProgress
from delo_llava.training.loop import StageRates, StepReport, run_steps
from delo_llava.training.module import MethodModule
from delo_llava.training.optim import parameter_groups
from delo_llava.training.ranks import Ranks


class StageTrainer:
    """Trains one task and publishes its adapter.

    Args:
        path: of the base, as `find_backbone` resolved it.
        method: built for this run; it holds no state between stages that is not on disk.
    """

    def __init__(
        self, config: RunConfig, store: RunStore, ranks: Ranks, backbone: Backbone, path: str, method: Method
    ) -> None:
        self.run_config, self.config, self.store, self.ranks = config, config, store, ranks
        self.backbone, self.path, self.method = backbone, path, method
        self.processor = backbone.load_processor(path)

    def train(self, task: TaskSpec, stage: Stage, progress: RunProgress) -> None:
        """Train `task` and publish `adapters/<task>`.

        Raises:
            DeloError: anything the guards find; nothing is published then.
        """
        self.config = self.run_config.for_task(task.name)
        began, seed = time.monotonic(), stage_seed(self.config.seed, stage.index)
        self.ranks.run_first(lambda: self.store.verify_published(stage.earlier))
        batches = TaskBatches(self.config, task, seed)
        self._check_plan(batches)
        seed_everything(seed)
        model = self._build(stage)
        if self.method.wants_preparation:
            self.method.prepare(model, self._preparation(batches, seed), self.ranks.sum)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        engine, module = self._engine(model)
        seed_everything(seed + 1 + self.ranks.rank)
        rates = self._run(engine, module, batches, stage, progress)
        self.method.end_task(model, self.ranks.sum)
        self._publish(engine, model, stage)
        engine.close()
        facts = {
            "index": stage.index,
            "steps": len(batches.steps),
            "samples": len(batches.records),
            "seed": seed,
            "trainable_parameters": trainable,
            "lr_first": rates.first,
            "lr_last": rates.last,
            "missing": batches.effective,
            "world": self.ranks.world,
            "train_seconds": time.monotonic() - began,
        }
        self.ranks.run_first(lambda: self._close_record(stage, facts))

    def _check_plan(self, batches: TaskBatches) -> None:
        """What ZeRO-3 cannot run on several ranks, told before the base is loaded."""
        if zero_stage(self.config) < 3 or self.ranks.world == 1:
            return
        batches.require_matching_ranks(self.ranks.world)
        if self.method.wants_dropped_view:
            raise DeloError(
                "A second view of some rows differs between ranks, which ZeRO-3 cannot run",
                given="consistency loss",
                fix="use --zero 2, or switch the consistency loss off",
            )

    def _build(self, stage: Stage) -> nn.Module:
        config = self.config
        base = self.backbone.load(
            self.path, quant=config.quant, dtype=config.dtype, attn=config.attn, device=str(self.ranks.device)
        )
        # A key/value cache is of no use in training and would be kept for the backward pass.
        base.config.get_text_config().use_cache = False
        model = self.method.begin_task(base, stage)
        if config.train.gradient_checkpointing:
            checkpoint_activations(base, model, self.method)
        return model.train()

    def _collator(self, seed: int, drop_view: bool) -> Collator:
        config = self.config
        return Collator(
            self.backbone,
            self.processor,
            config.data.max_length,
            config.missing.image,
            drop_view=drop_view,
            seed=seed,
        )

    def _preparation(self, batches: TaskBatches, seed: int) -> Any:
        """This rank's shard of the task, or of its first `preparation_records` complete ones."""
        collator, complete = self._collator(seed, drop_view=False), self.method.preparation_records
        shard = batches.shard(self.ranks.rank, self.ranks.world, collator, complete)
        return (batch.to(self.ranks.device) for batch in shard)

    def _engine(self, model: nn.Module) -> tuple[Engine, MethodModule]:
        config, ranks = self.config, self.ranks
        groups = parameter_groups(model, self.backbone.projector_pattern, config.train)
        module = MethodModule(model, self.method, touch_all=zero_stage(config) < 3)
        accumulation = plan_accumulation(config.train.global_batch, config.train.micro_batch, ranks.world)
        return build_engine(module, groups, config, ranks, accumulation), module

    def _run(
        self, engine: Engine, module: MethodModule, batches: TaskBatches, stage: Stage, progress: RunProgress
    ) -> StageRates:
        train, steps = self.config.train, len(batches.steps)
        log = MetricsLog(self.store.metrics, stage.index, train.tensorboard) if self.ranks.first else None
        progress.describe(f"{stage.index + 1}. {stage.task}")

        def report(step: StepReport) -> None:
            progress.step(step.seconds, step.loss)
            if log is not None and (step.step % train.log_every == 0 or step.step == steps - 1):
                epoch = (step.step + 1) * train.global_batch / len(batches.records)
                log.write(
                    {
                        "stage": stage.index,
                        "task": stage.task,
                        "epoch": epoch,
                        "time": time.time(),
                        **asdict(step),
                    }
                )

        collator = self._collator(stage_seed(self.config.seed, stage.index), self.method.wants_dropped_view)
        before = fingerprint(frozen_parameters(module.model))
        try:
            mine = batches.mine(self.ranks.rank, self.ranks.world, collator)
            rates = run_steps(engine, module, mine, steps, train, self.ranks, report)
        finally:
            if log is not None:
                log.close()
        require_unchanged(before, fingerprint(frozen_parameters(module.model)), stage.task)
        return rates

    def _publish(self, engine: Engine, model: nn.Module, stage: Stage) -> None:
        def save() -> None:
            with self.store.publish(stage.task) as folder:
                self.method.save(model, stage, folder)

        with engine.gathered():
            self.ranks.run_first(save)

    def _close_record(self, stage: Stage, facts: dict[str, Any]) -> None:
        self.store.update_stage(stage.task, **facts)
        self.store.verify_published(stage.earlier)


def stage_seed(seed: int, index: int) -> int:
    """The seed of a stage: runs and stages never share one."""
    return seed * 1000 + index


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def checkpoint_activations(base: Any, model: nn.Module, method: Method) -> None:
    """Recompute activations in the backward pass, without reentrant autograd.

    A method whose layers depend on a state of the forward pass (a route) has `checkpoint_context_fn(model)`,
    the `context_fn` of torch.utils.checkpoint that brings this state back for the recomputation.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    context = method.checkpoint_context_fn(model)
    if context is not None:
        options["context_fn"] = context
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def free_memory() -> None:
    """Return what the last stage held before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
