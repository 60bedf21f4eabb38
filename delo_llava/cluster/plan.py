"""The plan of a job as plain data (JSON), and as tables."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from delo_llava.cluster.advice import (
    GPU_SIZES,
    best_choice,
    communication,
    disk,
    largest_answer_batch,
    measured_throughput,
    refuse_impossible,
    setup_of,
)
from delo_llava.cluster.memory import MemoryModel, Parts, new_tokens
from delo_llava.cluster.models import planned_model
from delo_llava.config import RunConfig
from delo_llava.data.recipe import load_sequence, read_recipe
from delo_llava.data.sampler import plan_accumulation
from delo_llava.errors import DeloError
from delo_llava.runs.positions import within_positions
from delo_llava.tasks import StagePlan, TaskSequence, TaskSpec

GIB = 2**30


@dataclass(frozen=True)
class Job:
    """The machine, and what is known of the data and of the speed."""

    nodes: int = 1
    gpus: int = 1
    tokens: int | None = None
    image_tokens: int | None = None
    records: str | None = None
    samples_per_second: float | None = None
    from_run: Path | None = None

    @property
    def world(self) -> int:
        """Ranks: one for each GPU."""
        return self.nodes * self.gpus


def make_plan(config: RunConfig, job: Job) -> dict[str, Any]:
    """Everything that can be known of a job before it runs.

    Raises:
        DeloError: an unknown model, an impossible combination, or unreadable counts.
    """
    if job.nodes < 1 or job.gpus < 1:
        raise DeloError("A job needs at least one node with one GPU.", given=f"{job.nodes} x {job.gpus}")
    for task in read_recipe(config.task_seq).tasks:
        refuse_impossible(config.for_task(task.name), job.world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' renamings, of no use to the reader
        return _plan(config, job)


def _plan(config: RunConfig, job: Job) -> dict[str, Any]:
    model = planned_model(config.model, job.image_tokens)
    config, _ = within_positions(config, model.config)
    tokens = job.tokens or config.data.max_length
    memory, setup = MemoryModel(model, config, tokens), setup_of(config, job.world)
    tasks = [entry.name for entry in read_recipe(config.task_seq).tasks]
    # One micro-batch for the whole sequence must divide the batches of all its tasks.
    batch = math.gcd(*(config.for_task(task).train.global_batch for task in tasks))
    shared = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": batch})})
    passes = {task: _passes(config.for_task(task), job.world) for task in tasks}
    stages = memory.method.stages(_named(config.task_seq, tasks))
    train = memory.training(setup)
    answer = memory.evaluation(config.quant, config.eval.batch_size, len(stages), new_tokens(config))
    records, counted = _records(config, job, tasks)
    known = [stage for stage in stages if set(stage.tasks) <= set(records)]
    sizes = {stage.name: sum(records[task] for task in stage.tasks) for stage in known}
    steps = {stage.name: step_count(config.for_tasks(stage.tasks), sizes[stage.name]) for stage in known}
    return {
        "model": config.model,
        "parameters": memory.parameters,
        "trainable": memory.footprint.parameters,
        "method": config.method,
        "settings": setup.label(),
        "ranks": job.world,
        "tokens": tokens,
        "image_tokens": model.image.tokens,
        "passes": passes,
        "training": _bytes(train),
        "evaluation": _bytes(answer),
        "answer_batch": config.eval.batch_size,
        "fits": [size for size in GPU_SIZES if train.needed <= size * GIB],
        "evaluation_fits": [size for size in GPU_SIZES if answer.needed <= size * GIB],
        "largest_answer_batch": {
            str(size): largest_answer_batch(memory, config.quant, len(stages), new_tokens(config), size)
            for size in GPU_SIZES
        },
        "best": {str(size): _best(memory, shared, job.world, size) for size in GPU_SIZES},
        "records": records,
        "records_from": counted,
        "steps": steps,
        "bytes_per_step": communication(memory, setup, max(passes.values())),
        "disk": disk(memory, len(stages), checkpoints=3),
        "time": _time(config, job, known, steps),
    }


def _best(memory: MemoryModel, config: RunConfig, world: int, size: int) -> dict[str, Any] | None:
    choice = best_choice(memory, config, world, size)
    if choice is None:
        return None
    return {"settings": choice.setup.label(), "bytes": choice.parts.needed, "relative_time": choice.cost}


def _bytes(parts: Parts) -> dict[str, float]:
    return {**vars(parts), "total": parts.total, "needed": parts.needed}


def _named(task_seq: str, tasks: Sequence[str]) -> TaskSequence:
    """The sequence as a method's stages depend on it: by its tasks' names, as the data need not be here."""
    return TaskSequence(task_seq, tuple(TaskSpec(name, "", {}, Path()) for name in tasks))


def _passes(config: RunConfig, world: int) -> int:
    return plan_accumulation(config.train.global_batch, config.train.micro_batch, world)


def _records(config: RunConfig, job: Job, tasks: list[str]) -> tuple[dict[str, int], str]:
    """Training records of each task, and where the numbers come from; none is assumed."""
    if job.records is not None:
        return _given_records(job.records, tasks), "given"
    try:
        sequence = load_sequence(config.task_seq, config.data.root, config.data.template)
    except DeloError:
        return {}, "unknown: the data is not here; give --records"
    from delo_llava.data.readers import read_records

    counts = {t.name: len(read_records(t, "train", config.data.sub, config.seed)) for t in sequence.tasks}
    return counts, "counted in the data"


def _given_records(text: str, tasks: list[str]) -> dict[str, int]:
    try:
        if "=" not in text:
            return dict.fromkeys(tasks, int(text))
        pairs = dict(part.split("=", 1) for part in text.split(","))
        counts = {task: int(count) for task, count in pairs.items()}
    except ValueError as error:
        raise DeloError(
            "--records cannot be read.", given=text, fix="--records task=12726,other=34602"
        ) from error
    for task in counts:
        if task not in tasks:
            raise DeloError(
                "--records names a task that the sequence does not have.", given=task, allowed=tasks
            )
    return counts


def step_count(config: RunConfig, records: int) -> int:
    """Steps of a stage on so many records."""
    steps = math.ceil(config.train.epochs * records / config.train.global_batch)
    return min(steps, config.train.max_steps or steps)


def _time(
    config: RunConfig, job: Job, stages: Sequence[StagePlan], steps: Mapping[str, int]
) -> dict[str, Any]:
    """Hours of training, from a given or a measured throughput; unknown without one."""
    if job.samples_per_second is not None:
        rate, source = job.samples_per_second, "given"
    elif job.from_run is not None:
        measured, ranks = measured_throughput(job.from_run)
        rate = measured * job.world / ranks
        source = f"{measured:.2f} samples/s on {ranks} rank(s) in {job.from_run}, scaled to {job.world}"
    else:
        return {"source": "unknown: give --samples_per_second or --from_run"}
    samples = sum(steps[s.name] * config.for_tasks(s.tasks).train.global_batch for s in stages)
    return {"source": source, "samples_per_second": rate, "hours": samples / rate / 3600 if stages else None}


# ---- tables ----
def tables(plan: dict[str, Any]) -> Iterator[RenderableType]:
    """The plan for a person."""
    yield (
        f"{plan['model']}: {count_text(plan['parameters'])} parameters; {plan['method']} trains "
        f"{count_text(plan['trainable'])} a task; sequences up to {plan['tokens']} tokens "
        f"({plan['image_tokens']} of an image)"
    )
    yield _memory_table(plan)
    yield _fit_table(plan)
    yield _work_table(plan)


def _memory_table(plan: dict[str, Any]) -> Table:
    table = _table(
        f"memory of each of {plan['ranks']} GPU(s): {plan['settings']}", "part", "training", "evaluation"
    )
    for part in plan["training"]:
        both = [plan[kind][part] for kind in ("training", "evaluation")]
        if any(both):
            end = part in ("total", "needed")
            table.add_row(_PART.get(part, part), *map(size_text, both), style="bold" if end else "")
    return table


_PART = {
    "base": "frozen base",
    "quant_state": "quantisation state",
    "adapters": "adapters (of all finished tasks in evaluation)",
    "optimizer": "optimiser (with ZeRO's fp32 copy)",
    "buffers": "communication buckets",
    "activations": "activations and logits (KV cache in evaluation)",
    "tower": "vision tower",
    "overhead": "CUDA context",
    "loading": "while loading: the whole base on every GPU",
    "total": "together",
    "needed": "needed (running or loading)",
    "host": "main memory (offloaded)",
}


def _fit_table(plan: dict[str, Any]) -> Table:
    table = _table(
        "what fits", "GPU", "as asked", "eval.\nbatch_size", "best for training", "needs", "relative\ntime"
    )
    for size, best in plan["best"].items():
        asked = (int(size) in plan["fits"], int(size) in plan["evaluation_fits"])
        row = (f"{size} GB", _FITS[asked], f"≤ {plan['largest_answer_batch'][size]}")
        if best is None:
            table.add_row(*row, "nothing that is known here", "", "")
            continue
        flags = best["settings"].replace(" --", "\n--")  # so that no flag is broken
        table.add_row(*row, flags, size_text(best["bytes"]), f"{best['relative_time']:.2f}")
    return table


def _work_table(plan: dict[str, Any]) -> Table:
    table = _table("work", "", "")
    steps = ", ".join(f"{task} {count}" for task, count in plan["steps"].items())
    table.add_row("steps of each stage", steps or plan["records_from"])
    if steps:
        table.add_row("records", plan["records_from"])
    passes = plan["passes"]
    differ = len(set(passes.values())) > 1
    counts = ", ".join(f"{t} {n}" for t, n in passes.items()) if differ else str(next(iter(passes.values())))
    table.add_row("passes for a step and rank", counts)
    table.add_row("traffic of a GPU for a step, at most", size_text(plan["bytes_per_step"]))
    for what, size in plan["disk"].items():
        table.add_row(f"disk: {what}", size_text(size))
    time = plan["time"]
    hours = "" if time.get("hours") is None else f"{time['hours']:.1f} h of training "
    table.add_row("time", f"{hours}({time['source']})")
    return table


#: (training fits, evaluation fits) -> as a cell says it.
_FITS = {
    (True, True): "fits", (True, False): "training\nonly", (False, True): "evalua-\ntion only",
    (False, False): "too small",
}  # fmt: skip


def count_text(count: float) -> str:
    """A number of parameters: 7.06 B, 2.1 M, 850 K."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} K"


def size_text(size: float) -> str:
    """Bytes in the unit that shows them: 13.20 GiB, 4.1 MiB, 12.0 KiB, 0."""
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB" if size else "0"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
