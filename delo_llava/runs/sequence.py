"""A whole sequence: finished stages are skipped, the others trained, published and evaluated in turn.

Everything a user can get wrong is checked before torch, DeepSpeed or a model is loaded; so this module
imports them late.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delo_llava.engines.signals import Preempted
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file, write_json_atomic
from delo_llava.runs.job import Job
from delo_llava.runs.lock import locked
from delo_llava.runs.manifest import MANIFEST
from delo_llava.runs.record import STOPPED, ZERO_SHOT, data_facts, open_run, program_facts
from delo_llava.runs.steps import StepStore
from delo_llava.runs.store import RunStore
from delo_llava.strict import read_json

if TYPE_CHECKING:
    from delo_llava.engines.ranks import Ranks
    from delo_llava.runs.stage import StageTrainer
    from delo_llava.tasks import StagePlan
    from delo_llava.training.guards import Planner
    from delo_llava.training.logging import RunProgress

#: Evaluates one saved stage of a run folder (-1: the base before any training); called on every rank.
Evaluate = Callable[[Path, int], object]


def run_sequence(job: Job, evaluate: Evaluate | None = None, planner: "Planner | None" = None) -> Path:
    """Train and evaluate all tasks of a sequence, going on after the last finished stage.

    Args:
        evaluate: the harness's `evaluate_stage`; None trains only.
        planner: what a rank needs at most, in bytes; asked when memory is full.

    Returns:
        The path of results.json. `complete.json` beside it marks a run that reached its end.

    Raises:
        DeloError: whatever is wrong with an earlier launch, an adapter or a step.
        Preempted: on every rank, if any of them was asked to leave by a signal; what was done is saved.
    """
    from delo_llava.backbones.base import quiet_loading
    from delo_llava.engines.agree import require_agreement
    from delo_llava.engines.ranks import start_ranks, stop_ranks

    quiet_loading()  # one bar for each stage would tear ours apart
    store = RunStore(job.config.run_dir)
    ranks = start_ranks(job.config)
    with ExitStack() as held:
        try:
            ranks.leave_if_asked("starting")
            ranks.run_first(lambda: _take(store, held))
            require_agreement(ranks, partial(program_facts, job.config))
            ranks.run_first(lambda: open_run(store, job))
            require_agreement(ranks, partial(data_facts, store, job))
            _Sequence(job, store, ranks, evaluate).run(planner)
        except Preempted as asked:
            if asked.together:
                ranks.run_first(partial(_note_stop, store, asked))
                stop_ranks(ranks)
            else:  # this rank leaves alone, and nobody else can note it
                _note_stop(store, asked)
            raise
        stop_ranks(ranks)
    return store.results


def _take(store: RunStore, held: ExitStack) -> None:
    """Lock the run's folder until `held` ends, and say from whom it was taken, if from anybody."""
    taken = held.enter_context(locked(store.root))
    if taken:
        sys.stderr.write(f"{taken}\n")


def _note_stop(store: RunStore, asked: Preempted) -> None:
    """Tell run.json why the run is not complete; the next launch removes it."""
    if store.run.is_file():
        store.update_run(**{STOPPED: {"reason": asked.reason, "where": asked.where, "time": time.time()}})


class _Sequence:
    """The state of one launch."""

    def __init__(self, job: Job, store: RunStore, ranks: "Ranks", evaluate: Evaluate | None) -> None:
        self.job, self.store, self.ranks, self.evaluate = job, store, ranks, evaluate
        self.config, self.sequence, self.plans = job.config, job.sequence, job.plans

    def run(self, planner: "Planner | None") -> None:
        """Do what is left, on every rank."""
        from delo_llava.runs.stage import StageTrainer

        done = self._finished()
        if len(done) < len(self.plans):
            self.ranks.run_first(lambda: self.store.complete.unlink(missing_ok=True))
        trainer = StageTrainer(self.job, self.store, self.ranks, planner)
        with self._progress(len(done)) as progress:
            self._say_start(progress, done)
            self._look_ahead(self.plans[len(done) :], trainer, progress)
            self._zero_shot(progress)
            for index in range(len(self.plans)):
                self._stage(index, index < len(done), trainer, progress)
            self._finish(progress)

    def _finished(self) -> list[str]:
        """Stages with a published adapter, which must be the first ones; each is checked byte by byte."""
        done: list[str] = []
        names = [plan.name for plan in self.plans]

        def look() -> None:
            for name in names:
                if not self.store.finished(name):
                    break
                done.append(name)
            later = [name for name in names[len(done) :] if self.store.adapter(name).exists()]
            if later:
                raise DeloError(
                    f"The adapter of {names[len(done)]} is missing, but later ones exist",
                    given=", ".join(later),
                    fix="put it back, or remove the later ones as well to train them again",
                )
            for name in done:
                if "manifest" not in self.store.stage(name):
                    # The last launch was killed between publishing and noting it.
                    self.store.update_stage(name, manifest=sha256_file(self.store.adapter(name) / MANIFEST))
            self.store.verify_published(done)
            for name in done:  # the last launch may have been killed before it deleted them
                StepStore(self.store.step_checkpoints(name), keep=1).discard()

        self.ranks.run_first(look)
        return [name for name in names if self.store.adapter(name).exists()]

    def _look_ahead(
        self, left: Sequence["StagePlan"], trainer: "StageTrainer", progress: "RunProgress"
    ) -> None:
        """Find what would stop the run in a later stage, and say what should be known of its data."""
        from delo_llava.runs.preflight import Preflight

        def look() -> None:
            notes = Preflight(self.job, trainer.kit).run(left, self.evaluate is not None)
            self.store.update_run(notes=notes)
            for note in notes:
                progress.say(note)

        if left:
            progress.describe("looking at the data of all stages")
            self.ranks.run_first(look)

    def _stage(self, index: int, trained: bool, trainer: "StageTrainer", progress: "RunProgress") -> None:
        from delo_llava.runs.stage import free_memory, make_stage

        name = self.plans[index].name
        self.ranks.leave_if_asked(f"before {name}")
        if not trained:
            trainer.train(make_stage(index, self.job, self.store), progress)
            free_memory()
        if self.evaluate is None or self._evaluated(name):
            return
        self._evaluate(index, f"{index + 1}. {name}: evaluating", self._seen(index), progress)
        self.ranks.run_first(lambda: self.store.update_stage(name, evaluated=True))
        self._say_results(progress, index)

    def _zero_shot(self, progress: "RunProgress") -> None:
        """The row before any training, which forward transfer needs."""
        if self.evaluate is None or self.store.read_run().get(ZERO_SHOT):
            return
        self._evaluate(-1, "evaluating the base", len(self.sequence.tasks), progress)
        self.ranks.run_first(lambda: self.store.update_run(**{ZERO_SHOT: True}))
        self._say_results(progress, -1)

    def _evaluate(self, stage: int, text: str, cells: int, progress: "RunProgress") -> None:
        assert self.evaluate is not None
        self.ranks.leave_if_asked(f"before {text}")
        began = time.monotonic()
        progress.describe(text)
        self.evaluate(self.store.root, stage)
        self.ranks.barrier()
        progress.evaluated(time.monotonic() - began, cells)

    def _evaluated(self, task: str) -> bool:
        return bool(self.store.stage(task).get("evaluated"))

    def _progress(self, done: int) -> "RunProgress":
        from delo_llava.training.logging import RunProgress

        counts = [self._step_count(plan) for plan in self.plans]
        cells = [
            self._seen(i)
            for i, plan in enumerate(self.plans)
            if self.evaluate and not self._evaluated(plan.name)
        ]
        zero_shot = (
            0 if self.evaluate is None or self.store.read_run().get(ZERO_SHOT) else len(self.sequence.tasks)
        )
        left = sum(counts[done:])
        return RunProgress(left, sum(cells) + zero_shot, sum(counts[:done]), self.ranks.first)

    def _seen(self, index: int) -> int:
        """How many tasks are trained up to stage `index`."""
        return len({task for plan in self.plans[: index + 1] for task in plan.tasks})

    def _step_count(self, plan: "StagePlan") -> int:
        """Optimiser steps of a stage on its own records; reads them, so their faults are told before any
        model loads.
        """
        import math

        from delo_llava.data.readers import read_records

        tasks = [task for task in self.sequence.tasks if task.name in plan.tasks]
        train = self.config.for_tasks(plan.tasks).train
        records = sum(len(read_records(t, "train", self.config.data.sub, self.config.seed)) for t in tasks)
        steps = math.ceil(train.epochs * records / train.global_batch)
        return min(steps, train.max_steps or steps)

    def _say_start(self, progress: "RunProgress", done: list[str]) -> None:
        config = self.config
        engine = (
            "one process"
            if config.zero == "none"
            else f"DeepSpeed ({config.ds_config or f'ZeRO {config.zero}'})"
        )
        progress.say(
            f"{config.method} on {self.sequence.name}: {len(self.sequence.tasks)} tasks, "
            f"{self.ranks.world} rank(s), {engine}, {self.ranks.device}, {config.quant}, "
            f"missing {config.missing.ratio:.0%} {config.missing.kind} -> {self.store.root}"
        )
        for note in self.job.notes:
            progress.say(note)
        for task in self.sequence.tasks:
            for absent in task.absent:
                progress.say(f"{task.name}: no {absent}")
        if done:
            progress.say(f"already finished: {', '.join(done)}")

    def _say_results(self, progress: "RunProgress", stage: int) -> None:
        from delo_llava.data.omitted import evaluated_lines
        from delo_llava.training.logging import matrix_row

        if self.ranks.first and self.store.results.is_file():
            if stage >= 0:
                progress.say(matrix_row(self._results(), stage, self.plans[stage].name))
            for line in evaluated_lines(self._results(), "zero_shot" if stage < 0 else str(stage)):
                progress.say(line)

    def _results(self) -> dict[str, Any]:
        fix = "move it away and evaluate again: delo-eval --stage all"
        content = read_json(self.store.results, "results.json", fix)
        if not {"tasks", "matrix", "metrics"} <= content.keys():
            raise DeloError("results.json is damaged.", given=self.store.results, fix=fix)
        return content

    def _finish(self, progress: "RunProgress") -> None:
        from delo_llava.training.logging import matrix_summary

        marker = {"tasks": self.sequence.names, "evaluated": self.evaluate is not None, "time": time.time()}
        self.ranks.run_first(lambda: write_json_atomic(self.store.complete, marker))
        if self.ranks.first and self.store.results.is_file():
            progress.say(matrix_summary(self._results(), [plan.name for plan in self.plans]))
            progress.say(f"results: {self.store.results}")
        if self.ranks.first and self.store.report.is_file():
            progress.say(f"report: {self.store.report}")
