"""One stage: a pure function of the base, the earlier adapters on disk, the task's data and the seed."""

import gc
import random
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from delo_llava.adapters.own import TENSORS
from delo_llava.adapters.store import require_same_tensors
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Collator
from delo_llava.data.sampler import plan_accumulation
from delo_llava.engines.deepspeed import Engine, build_engine, zero_stage
from delo_llava.engines.module import MethodModule
from delo_llava.engines.optim import parameter_groups
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.signals import Preempted
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Stage
from delo_llava.runs.observer import StageObserver
from delo_llava.runs.step_state import Resumed, StepCheckpoints
from delo_llava.runs.steps import StepStore
from delo_llava.runs.store import RunStore
from delo_llava.tasks import TaskSpec
from delo_llava.training.guards import (
    OutOfMemory,
    Planner,
    fingerprint,
    frozen_parameters,
    memory_planned,
    memory_told,
    require_unchanged,
    smaller_micro_batch,
)
from delo_llava.training.logging import RunProgress
from delo_llava.training.loop import Ledger, run_steps
from delo_llava.training.mixture import TaskBatches

#: Ranks that a checkpoint has no random state for, as there were fewer, are seeded this far apart by step.
RANK_SEEDS = 1_000_003


class StageTrainer:
    """Trains one task and publishes its adapter.

    Args:
        path: of the base, as `find_backbone` resolved it.
        method: built for this run; it holds no state between stages that is not on disk.
        planner: asked when memory is full.
    """

    def __init__(
        self,
        config: RunConfig,
        store: RunStore,
        ranks: Ranks,
        backbone: Backbone,
        path: str,
        method: Method,
        planner: Planner | None = None,
    ) -> None:
        self.run_config, self.store, self.ranks = config, store, ranks
        #: The run's, with what differs for the task that is being trained: `per_task`, a halved micro-batch.
        self.config = config
        self.backbone, self.path, self.method, self.planner = backbone, path, method, planner
        self.processor = backbone.load_processor(path)

    def train(self, task: TaskSpec, stage: Stage, progress: RunProgress) -> None:
        """Train `task`, from its last checkpoint if there is one, and publish `adapters/<task>`.

        Raises:
            DeloError: anything the guards find; nothing is published then.
            Preempted: a rank was asked to leave, or the micro-batch was halved on several ranks; the same
                command goes on.
        """
        while True:
            self.config = self.run_config.for_task(task.name)
            smaller = self.ranks.same(self.store.stage(stage.task).get("micro_batch"))
            if smaller is not None:
                train = self.config.train.model_copy(update={"micro_batch": smaller})
                self.config = self.config.model_copy(update={"train": train})
            planned = partial(memory_planned, self.planner, self.config, self.ranks)
            try:
                with memory_told(self.config.train, self.ranks.device, planned):
                    self._train(task, stage, progress)
                break
            except OutOfMemory as error:
                self._halve(stage, error, progress)
            free_memory()  # only here: the error's traceback holds the model
        self.config = self.run_config

    def _halve(self, stage: Stage, error: OutOfMemory, progress: RunProgress) -> None:
        """Note a smaller micro-batch for the rest of the stage, if the run may use one.

        Raises:
            OutOfMemory: it may not, or there is none.
            Preempted: on several ranks, whose common state is lost when one of them fails.
        """
        smaller = smaller_micro_batch(self.config.train, self.ranks.world)
        if self.config.train.on_oom == "stop" or smaller is None:
            raise error
        self.store.update_stage(stage.task, micro_batch=smaller)
        progress.say(f"{error.message}: going on with train.micro_batch={smaller}")
        if self.ranks.world > 1:
            reason = f"a lack of memory (now train.micro_batch={smaller})"
            raise Preempted(reason, f"training {stage.task}", together=False)

    def _train(self, task: TaskSpec, stage: Stage, progress: RunProgress) -> None:
        began, seed = time.monotonic(), stage_seed(self.config.seed, stage.index)
        self.ranks.run_first(lambda: self.store.verify_published(stage.earlier))
        batches = TaskBatches(self.config, task, seed)
        self._check_plan(batches)
        checkpoints = self._checkpoints(stage)
        resumed = self._find(checkpoints, stage, progress)
        seed_everything(seed)
        model = self._build(stage)
        collator = self._collator(seed, self.method.wants_dropped_view)
        if resumed is not None:
            resumed.load_weights(model)
            self.method.load_state_dict(model, resumed.method)
        elif self.method.wants_preparation:
            self.method.prepare(model, self._preparation(batches, seed), self.ranks.sum)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        engine, module = self._engine(model)
        start, ledger = self._start(resumed, engine, seed, progress)
        observer = StageObserver(
            self.config, self.store, self.ranks, stage, engine, checkpoints, collator, ledger, progress,
            steps=len(batches.steps), records=len(batches.records), start=start, began=began,
        )  # fmt: skip
        try:
            self._run(engine, module, batches, stage, observer)
            self.method.end_task(model, self.ranks.sum)
            facts = {
                "index": stage.index,
                "steps": len(batches.steps),
                "samples": len(batches.records),
                "seed": seed,
                "trainable_parameters": trainable,
                "lr_first": ledger.first,
                "lr_last": ledger.last,
                "missing": batches.effective,
                "world": self.ranks.world,
                "train_seconds": observer.seconds(),
                "skipped_steps": ledger.skipped,
                "bad_images": self.ranks.union(ledger.bad_images),
                "resumed_at": ledger.resumed,
            }
            # Before the adapter: a launch killed in between trains the end of the stage again and notes it
            # again, while one killed after publishing never comes back here.
            self.ranks.run_first(lambda: self.store.update_stage(stage.task, **facts))
            self._publish(engine, model, stage)
        finally:
            engine.close()
        self.ranks.run_first(lambda: self.store.verify_published(stage.earlier))
        checkpoints.discard()

    def _checkpoints(self, stage: Stage) -> StepCheckpoints:
        steps = StepStore(self.store.step_checkpoints(stage.task), self.config.train.keep)
        facts = {"task": stage.task, "stage": stage.index, "zero": self.config.zero}
        return StepCheckpoints(steps, self.ranks, self.method, facts)

    def _find(self, checkpoints: StepCheckpoints, stage: Stage, progress: RunProgress) -> Resumed | None:
        """The checkpoint to go on from; bad ones are told and noted in run.json."""
        resumed = checkpoints.find()
        where = "the beginning of the stage" if resumed is None else f"step {resumed.step}"
        if checkpoints.faults:
            told = "; ".join(checkpoints.faults)
            progress.say(f"{stage.task}: a checkpoint is damaged, going on from {where}: {told}")
            self.ranks.run_first(
                lambda: self.store.update_stage(stage.task, bad_checkpoints=checkpoints.faults)
            )
        elif resumed is not None:
            progress.say(f"{stage.task}: going on from {where}")
        return resumed

    def _start(
        self, resumed: Resumed | None, engine: Engine, seed: int, progress: RunProgress
    ) -> tuple[int, Ledger]:
        """The first step to train and what is known of the steps before it; sets the random states."""
        start = 0 if resumed is None else resumed.step
        seed_everything(seed + 1 + self.ranks.rank + RANK_SEEDS * start)
        if resumed is None:
            return 0, Ledger()
        resumed.load_engine(engine)
        resumed.load_random()
        progress.resumed(start)
        ledger = resumed.ledger()
        ledger.resumed.append(start)
        if not self.ranks.first:
            ledger.bad_images = {}  # the first rank keeps those of all; this one's own come again
        return start, ledger

    def _check_plan(self, batches: TaskBatches) -> None:
        """What ZeRO-3 cannot run on several ranks, told before the base is loaded."""
        if zero_stage(self.config) < 3 or self.ranks.world == 1:
            return
        batches.require_matching_ranks(self.ranks.world)
        if self.config.data.on_bad_image == "skip" and self.config.missing.image == "absent":
            raise DeloError(
                "ZeRO-3 needs the same passes on all ranks, and a record that is left out may have a pass's "
                "only image",
                given="data.on_bad_image=skip",
                fix="use --zero 2, --missing.image dummy, or --data.on_bad_image=error",
            )
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
            skip_bad_images=config.data.on_bad_image == "skip",
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
        self,
        engine: Engine,
        module: MethodModule,
        batches: TaskBatches,
        stage: Stage,
        observer: StageObserver,
    ) -> None:
        observer.progress.describe(f"{stage.index + 1}. {stage.task}")
        before = fingerprint(frozen_parameters(module.model))
        mine = batches.mine(self.ranks.rank, self.ranks.world, observer.collator, observer.start)
        with observer.logging():
            run_steps(
                engine, module, mine, len(batches.steps), self.config.train, self.ranks, observer,
                start=observer.start, ledger=observer.ledger,
            )  # fmt: skip
        require_unchanged(before, fingerprint(frozen_parameters(module.model)), stage.task)

    def _publish(self, engine: Engine, model: nn.Module, stage: Stage) -> None:
        def save() -> None:
            with self.store.publish(stage.task) as folder:
                self.method.save(model, stage, folder)
                require_same_tensors(self.method.adapter_tensors(model, stage), folder / TENSORS)

        with engine.gathered():
            self.ranks.run_first(save)


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
