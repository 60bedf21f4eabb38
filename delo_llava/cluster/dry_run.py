"""`train --dry_run`: everything that a run checks and will need, without a weight loaded or a step made."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console, RenderableType
from rich.table import Table

from delo_llava.backbones.base import quiet_loading, resolve_device
from delo_llava.cluster.advice import disk, setup_of
from delo_llava.cluster.memory import MemoryModel, Parts
from delo_llava.cluster.models import planned_model
from delo_llava.cluster.plan import count_text, size_text, step_count
from delo_llava.config import RunConfig
from delo_llava.data.missing import record_presence
from delo_llava.data.readers import read_records
from delo_llava.errors import DeloError
from delo_llava.runs.job import Job
from delo_llava.runs.preflight import Preflight
from delo_llava.runs.record import changes_of, run_facts
from delo_llava.runs.stage import examples_of
from delo_llava.runs.store import RunStore
from delo_llava.tasks import StagePlan
from delo_llava.training.fit import Kit


@dataclass(frozen=True)
class Needs:
    """What a run needs of this machine.

    Attributes:
        training, evaluation: memory of one rank, with sequences as long as `data.max_length`.
        disk: bytes that adapters, and step checkpoints for a while, will take. free: of the disk.
    """

    trained: int
    training: Parts
    evaluation: Parts
    disk: dict[str, float]
    free: int


def dry_run(job: Job, world: int) -> None:
    """Check and show a run from where it stands; writes nothing.

    Args:
        world: ranks that the run will have.

    Raises:
        DeloError: whatever the run would be refused for, or stop for later.
    """
    quiet_loading()
    store, console = RunStore(job.config.run_dir), Console()
    left = _left(store, job)
    processor = job.backbone.load_processor(job.base, job.config.data.limits)
    preflight = Preflight(job, Kit(job.backbone, processor, job.sequence.rooms))
    with console.status("looking at the data of all stages"):
        notes = [*job.notes, *preflight.run(left, evaluates=True)]
    with console.status("running a step in shapes"):
        needs = _needs(job, world, len(left))
    for part in (_stages(job, left), _questions(job.config, job), *_sentences(job, needs, world, notes)):
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)
    if needs.free < sum(needs.disk.values()):
        raise DeloError(
            "The disk has too little room for what this run will write.",
            given=f"{size_text(needs.free)} free, {size_text(sum(needs.disk.values()))} needed",
            fix="make room, keep fewer checkpoints (--train.keep=1), or choose another --output",
        )


def _left(store: RunStore, job: Job) -> list[StagePlan]:
    """The stages that are not published.

    Raises:
        DeloError: the folder holds a run of something else.
    """
    if store.run.is_file():
        changes_of(store, job, run_facts(store, job, keep=False))
    return [plan for plan in job.plans if not store.finished(plan.name)]


def _stages(job: Job, left: list[StagePlan]) -> Table:
    """Records, steps and missing modalities of every stage."""
    title = f"{job.config.method} on {job.sequence.name}: {len(left)} of {len(job.plans)} stages to do"
    table = Table(title_justify="left", title=title)
    for head in ("stage", "records", "steps", "without image", "without context", "neither"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    tasks = {task.name: task for task in job.sequence.tasks}
    for index, plan in enumerate(job.plans):
        config = job.config.for_tasks(plan.tasks)
        examples = examples_of(config, [tasks[name] for name in plan.tasks])
        image, text = examples.presence.T
        counts = (len(examples), step_count(config, len(examples)))
        missing = (int((~image).sum()), int((~text).sum()), int((~image & ~text).sum()))
        done = "" if plan in left else " (done)"
        table.add_row(f"{index + 1}. {plan.name}{done}", *(f"{n:,}" for n in (*counts, *missing)))
    return table


def _questions(config: RunConfig, job: Job) -> Table:
    """What is asked of every task, under the run's own missing pattern."""
    table = Table(title_justify="left", title=f"questions of each evaluation ({config.eval.split})")
    for head in ("task", "questions", "without image", "without context", "scorer", "tokens of an answer"):
        table.add_column(head, justify="left" if head in ("task", "scorer") else "right")
    for task in job.sequence.tasks:
        records = read_records(task, config.eval.split)
        shown = record_presence(config.missing, records)
        asked = len(records) if config.eval.limit is None else min(len(records), config.eval.limit)
        lost = [f"{int(count):,}" for count in np.logical_not(shown).sum(0)]
        table.add_row(task.name, f"{asked:,}", *lost, task.scorer, str(task.max_new_tokens))
    return table


def _needs(job: Job, world: int, left: int) -> Needs:
    config, cuda = job.config, resolve_device(job.config.device).type == "cuda"
    memory = MemoryModel(planned_model(config.model), config, config.data.max_length, cuda)
    answers = memory.evaluation(config.quant, config.eval.batch_size, len(job.plans), memory.answers)
    folder = next(p for p in (config.run_dir, *config.run_dir.absolute().parents) if p.is_dir())
    space = disk(memory, left, checkpoints=config.train.keep + 1 if config.train.save_every else 1)
    return Needs(
        memory.footprint.parameters,
        memory.training(setup_of(config, world)),
        answers,
        space if left else dict.fromkeys(space, 0.0),
        shutil.disk_usage(folder).free,
    )


def _sentences(job: Job, needs: Needs, world: int, notes: list[str]) -> Iterator[RenderableType]:
    """What is no table: memory, disk, notes, and that all was well."""
    config = job.config
    have = _memory_here(resolve_device(config.device))
    told = f"; this machine's has {size_text(have)}" if have else ""
    ranks = f"{world} rank{'s' * (world > 1)}"
    trained = f"{count_text(needs.trained)} parameters are trained a stage"
    yield f"{trained}, on {ranks}, ZeRO {config.zero}, {config.quant}"
    yield (
        f"memory of a rank, at most: training {size_text(needs.training.needed)}, evaluation "
        f"{size_text(needs.evaluation.needed)}{told}"
    )
    parts = ", ".join(f"{what} {size_text(size)}" for what, size in needs.disk.items())
    yield f"disk: {parts}; free {size_text(needs.free)} for {config.run_dir}"
    yield "time: told after the first steps of a run (`plan --from_run` takes the speed of another one)"
    yield from notes
    yield "every check was passed; nothing was written"


def _memory_here(device: torch.device) -> int:
    """Bytes of the GPU; 0 on a CPU, whose memory all processes share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
