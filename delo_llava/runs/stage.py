"""One stage on disk: a pure function of the base, the earlier adapters, the tasks' data and the seed.

Goes on from the stage's last checkpoint if there is one, trains it by `training.fit`, and publishes its
adapter.
"""

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from delo_llava.adapters.own import TENSORS
from delo_llava.adapters.store import require_same_tensors
from delo_llava.config import RunConfig
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.examples import Examples
from delo_llava.data.missing import effective
from delo_llava.data.omitted import omitted_lines, trained_without
from delo_llava.data.readers import Records, read_records
from delo_llava.engines.deepspeed import engine_name
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.signals import Preempted
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Mixture, Past, Stage
from delo_llava.runs.job import Job
from delo_llava.runs.observer import StageObserver
from delo_llava.runs.room import require_room, room_needed
from delo_llava.runs.step_state import Resumed, StepCheckpoints
from delo_llava.runs.steps import StepStore
from delo_llava.runs.store import RunStore
from delo_llava.tasks import TaskSpec
from delo_llava.training.fit import Fitted, Kit, Running, fit, seed_everything
from delo_llava.training.guards import (
    OutOfMemory,
    Planner,
    memory_planned,
    memory_told,
    smaller_micro_batch,
)
from delo_llava.training.logging import RunProgress


class StageTrainer:
    """Trains one stage and publishes its adapter.

    Args:
        planner: asked when memory is full.
    """

    def __init__(self, job: Job, store: RunStore, ranks: Ranks, planner: Planner | None = None) -> None:
        self.job, self.store, self.ranks, self.planner = job, store, ranks, planner
        #: The run's, with what differs for the stage that is being trained: `per_task`, a halved micro-batch.
        self.config = job.config
        #: It holds no state between stages that is not on disk.
        self.method = job.method
        processor = job.backbone.load_processor(job.base, job.config.data.limits)
        self.kit = Kit(job.backbone, processor, job.sequence.rooms)
        ranks.run_first(lambda: note_dialogue(store, self.kit.processor.dialogue))

    def train(self, stage: Stage, progress: RunProgress) -> None:
        """Train `stage`, from its last checkpoint if there is one, and publish `adapters/<its name>`.

        Raises:
            DeloError: anything the guards find; nothing is published then.
            Preempted: a rank was asked to leave, or the micro-batch was halved on several ranks; the same
                command goes on.
        """
        while True:
            self.config = self.job.config.for_tasks([task.name for task in stage.tasks])
            smaller = self.ranks.same(self.store.stage(stage.name).get("micro_batch"))
            if smaller is not None:
                train = self.config.train.model_copy(update={"micro_batch": smaller})
                self.config = self.config.model_copy(update={"train": train})
            planned = partial(memory_planned, self.planner, self.config, self.ranks)
            try:
                with memory_told(self.config.train, self.ranks.device, planned):
                    self._train(stage, progress)
                break
            except OutOfMemory as error:
                self._halve(stage, error, progress)
            free_memory()  # only here: the error's traceback holds the model
        self.config = self.job.config

    def _halve(self, stage: Stage, error: OutOfMemory, progress: RunProgress) -> None:
        """Note a smaller micro-batch for the rest of the stage, if the run may use one.

        Raises:
            OutOfMemory: it may not, or there is none.
            Preempted: on several ranks, whose common state is lost when one of them fails.
        """
        smaller = smaller_micro_batch(self.config.train, self.ranks.world)
        if self.config.train.on_oom == "stop" or smaller is None:
            raise error
        self.store.update_stage(stage.name, micro_batch=smaller)
        progress.say(f"{error.message}: going on with train.micro_batch={smaller}")
        if self.ranks.world > 1:
            reason = f"a lack of memory (now train.micro_batch={smaller})"
            raise Preempted(reason, f"training {stage.name}", together=False)

    def _train(self, stage: Stage, progress: RunProgress) -> None:
        began = time.monotonic()
        self.ranks.run_first(lambda: self.store.verify_published(stage.past))
        mixture = self.method.mixture(
            stage, examples_of(self.config, stage.tasks), PastExamples(self, stage.past)
        )
        checkpoints = self._checkpoints(stage)
        resumed = self._find(checkpoints, stage, progress)
        seed_everything(stage.seed)
        model = self._build(stage)
        self.ranks.run_first(lambda: self._require_room(stage, mixture, model, checkpoints))
        observers: list[StageObserver] = []

        def observe(running: Running) -> StageObserver:
            progress.describe(f"{stage.index + 1}. {stage.name}")
            progress.resumed(running.start)
            observers.append(
                StageObserver(
                    self.config, self.store, self.ranks, stage, checkpoints, progress, running, began
                )
            )
            return observers[-1]

        try:
            fitted = fit(
                model, self.method, mixture, self.config, self.ranks, self.kit,
                seed=stage.seed, resumed=resumed, observe=observe,
            )  # fmt: skip
        finally:
            for observer in observers:
                observer.close()
        seconds = observers[-1].seconds() if observers else time.monotonic() - began
        facts = self._facts(stage, fitted, seconds)
        for line in omitted_lines(facts["omitted"], "train"):
            progress.say(line)
        # Before the adapter: a launch killed in between trains the end of the stage again and notes it
        # again, while one killed after publishing never comes back here.
        self.ranks.run_first(lambda: self.store.update_stage(stage.name, **facts))
        self.ranks.run_first(lambda: self._publish(fitted.model, stage))
        self.ranks.run_first(lambda: self.store.verify_published(stage.past))
        checkpoints.discard()

    def _require_room(
        self, stage: Stage, mixture: Mixture, model: nn.Module, checkpoints: StepCheckpoints
    ) -> None:
        """Refuse to begin what the disk has no room for."""
        train = self.config.train
        steps = math.ceil(train.epochs * len(mixture[0].examples) / train.global_batch)
        left, saved = len(self.job.plans) - stage.index, len(checkpoints.steps.published())
        steps = min(steps, train.max_steps or steps)
        require_room(self.store.root, room_needed(model, self.method.state_dict(), train, left, steps, saved))

    def _facts(self, stage: Stage, fitted: Fitted, seconds: float) -> dict[str, Any]:
        """What run.json says of the stage."""
        ledger = fitted.ledger.gathered(self.ranks)
        return {
            "index": stage.index,
            "steps": fitted.steps,
            "samples": fitted.examples,
            "seed": stage.seed,
            "trainable_parameters": fitted.trainable,
            "lr_first": ledger.first,
            "lr_last": ledger.last,
            "missing": self._missing(stage.tasks),
            "world": self.ranks.world,
            "zero": engine_name(self.config),
            "train_seconds": seconds,
            "skipped_steps": ledger.skipped,
            "bad_images": ledger.bad_images,
            "omitted": trained_without(ledger.cut.counts(), ledger.bad_images),
            "resumed_at": ledger.resumed,
        }

    def _missing(self, tasks: tuple[TaskSpec, ...]) -> dict[str, Any]:
        """What is missing in the training records: of the stage's task, or of each one by name."""
        found = {
            task.name: effective(self.config.missing, training_records(self.config, task)) for task in tasks
        }
        return dict(next(iter(found.values()))) if len(found) == 1 else dict(found)

    def _checkpoints(self, stage: Stage) -> StepCheckpoints:
        steps = StepStore(self.store.step_checkpoints(stage.name), self.config.train.keep)
        facts = {"task": stage.name, "stage": stage.index, "zero": self.config.zero}
        return StepCheckpoints(steps, self.ranks, self.method, facts)

    def _find(self, checkpoints: StepCheckpoints, stage: Stage, progress: RunProgress) -> Resumed | None:
        """The checkpoint to go on from; bad ones are told and noted in run.json."""
        resumed = checkpoints.find()
        where = "the beginning of the stage" if resumed is None else f"step {resumed.step}"
        if checkpoints.faults:
            told = "; ".join(checkpoints.faults)
            progress.say(f"{stage.name}: a checkpoint is damaged, going on from {where}: {told}")
            self.ranks.run_first(
                lambda: self.store.update_stage(stage.name, bad_checkpoints=checkpoints.faults)
            )
        elif resumed is not None:
            progress.say(f"{stage.name}: going on from {where}")
        return resumed

    def _build(self, stage: Stage) -> nn.Module:
        config = self.config
        base = self.job.backbone.load(
            self.job.base,
            quant=config.quant,
            dtype=config.dtype,
            attn=config.attn,
            device=str(self.ranks.device),
        )
        # A key/value cache is of no use in training and would be kept for the backward pass.
        base.config.get_text_config().use_cache = False
        model = self.method.begin(base, stage)
        if config.train.gradient_checkpointing:
            checkpoint_activations(base, model, self.method)
        return model.train()

    def _publish(self, model: nn.Module, stage: Stage) -> None:
        with self.store.publish(stage.name) as folder:
            self.method.save(model, stage, folder)
            require_same_tensors(self.method.tensors(model, stage), folder / TENSORS)


class PastExamples(Mapping[str, Examples]):
    """The examples of earlier stages by name; one is read when it is asked for."""

    def __init__(self, trainer: StageTrainer, past: Mapping[str, Past]) -> None:
        self._trainer, self._past = trainer, past

    def __getitem__(self, name: str) -> Examples:
        return examples_of(self._trainer.config, self._past[name].tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._past)

    def __len__(self) -> int:
        return len(self._past)


def examples_of(config: RunConfig, tasks: Sequence[TaskSpec]) -> Examples:
    """The training records of some tasks under the run's missing pattern."""
    parts = (Examples.of(training_records(config, task), config.missing) for task in tasks)
    return sum(parts, start=Examples())


def training_records(config: RunConfig, task: TaskSpec) -> Records:
    """The training records that a run uses of a task."""
    return read_records(task, "train", config.data.sub, config.seed)


def note_dialogue(store: RunStore, dialogue: Dialogue) -> None:
    """Record how the run's prompts are written, or check that they still are.

    Raises:
        DeloError: the base's chat template was changed since.
    """
    known, now = store.read_run().get("dialogue"), asdict(dialogue)
    if known not in (None, now):
        raise DeloError(
            "The base's chat template is not the one that this run was trained with",
            given=now,
            allowed=[known],
            fix="put the base's own files back, or start with another --output",
        )
    store.update_run(dialogue=now)


def make_stage(index: int, job: Job, store: RunStore) -> Stage:
    """Stage `index` of a run, with what earlier ones left."""
    tasks = {task.name: task for task in job.sequence.tasks}
    past = {
        plan.name: Past(store.adapter(plan.name), tuple(tasks[name] for name in plan.tasks))
        for plan in job.plans[:index]
    }
    plan = job.plans[index]
    own = tuple(tasks[name] for name in plan.tasks)
    return Stage(index, plan.name, own, past, stage_seed(job.config.seed, index))


def stage_seed(seed: int, index: int) -> int:
    """The seed of a stage: runs and stages never share one."""
    return seed * 1000 + index


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
