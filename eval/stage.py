"""Evaluate one saved stage: in training and by itself, by the same function, with the same numbers."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed

from delo_eval.derived import choice_statistics
from delo_eval.generate import Answerer
from delo_eval.matrix import ZERO_SHOT
from delo_eval.plots import PLOTS, draw
from delo_eval.predictions import Row, merge_parts, prediction_file, prediction_row, write_part
from delo_eval.questions import Cell, Questions, cells_of
from delo_eval.report.render import try_report
from delo_eval.results import Results, results_json, resume_results, write_results
from delo_eval.routing_use import merge_use_parts, use_file, write_use_part
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.backbones.base import Backbone, find_backbone, resolve_device
from delo_llava.checkpoint.store import RunStore
from delo_llava.config import RunConfig, load_config
from delo_llava.data.collate import Collator
from delo_llava.data.recipe import load_sequence
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method
from delo_llava.registry import load_plugin
from delo_llava.tasks import TaskSequence, TaskSpec
from delo_llava.training.ranks import PATIENCE, Ranks

#: (cell being evaluated, questions done, questions in all), of this rank.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What an evaluation of a stored run may change; None keeps what the run's configuration says.

    Attributes:
        split: `val` or `test`.
        patterns: missing patterns.
        limit: records per task.
        batch_size: of decoding; changes speed, not results.
        output: folder of predictions and results; the run's own, or `<run>/eval-<split>` for another split.
    """

    split: str | None = None
    patterns: tuple[str, ...] | None = None
    limit: int | None = None
    batch_size: int | None = None
    output: Path | None = None


@dataclass
class StoredRun:
    """A run folder opened for evaluation; `output` is where predictions and results go."""

    store: RunStore
    config: RunConfig
    sequence: TaskSequence
    backbone: Backbone
    model_path: str
    method: Method
    output: Path
    patterns: tuple[str, ...] | None

    def patterns_of(self, stage: int) -> list[str]:
        """The patterns to evaluate after `stage`: the run's, and further ones after the last."""
        chosen = self.config.eval
        last = stage == len(self.sequence.tasks) - 1
        return list(
            dict.fromkeys(self.patterns or [*chosen.patterns, *(chosen.last_patterns if last else [])])
        )

    def adapters(self, stage: int) -> dict[str, Path]:
        """Task -> published folder of the stages up to `stage`, proven unchanged.

        Raises:
            DeloError: a stage that does not exist or is not trained, or a folder that is not what was
                published.
        """
        names = self.sequence.names
        if not ZERO_SHOT <= stage < len(names):
            raise DeloError("There is no such stage.", given=stage, allowed=range(ZERO_SHOT, len(names)))
        tasks = names[: stage + 1]
        for task in tasks:
            if not self.store.adapter(task).is_dir():
                raise DeloError(
                    f"Stage {names.index(task)} ({task}) is not trained yet.", given=self.store.root
                )
        self.store.verify_published(tasks)
        return {task: self.store.adapter(task) for task in tasks}


def open_run(run_dir: Path, request: Request = Request()) -> StoredRun:
    """Read a run's stored configuration; no model is loaded.

    Raises:
        DeloError: no run there, data or model gone, or an impossible request.
    """
    store = RunStore(run_dir)
    if not store.config.is_file():
        raise DeloError(
            "There is no run in this folder: config.yaml is missing.",
            given=run_dir,
            fix="name a folder that training wrote",
        )
    stored = load_config(store.config)
    changes = {"split": request.split, "limit": request.limit, "batch_size": request.batch_size}
    wanted = stored.eval.model_copy(
        update={key: value for key, value in changes.items() if value is not None}
    )
    config = stored.model_copy(update={"eval": wanted})
    backbone, path = find_backbone(config.model)
    kind = cast(type[Method], load_plugin("method", config.method))
    method = kind(kind.Config(**config.methods.get(config.method, {})), config, backbone)
    own = (
        run_dir
        if wanted.split == stored.eval.split and wanted.limit == stored.eval.limit
        else run_dir / f"eval-{wanted.split}"
    )
    sequence = load_sequence(config.task_seq, config.data.root, config.data.template)
    return StoredRun(store, config, sequence, backbone, path, method, request.output or own, request.patterns)


def evaluate_stage(
    run_dir: Path,
    stage: int,
    *,
    request: Request = Request(),
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Evaluate the run as it stands after `stage`, write predictions and update results.json.

    Every rank calls it; each loads its own whole copy of the model and answers its share of the batches.

    Args:
        run_dir: folder of the run.
        stage: index from 0; −1 is the bare base, the zero-shot row.
        request: what to change for this evaluation.
        ranks: the processes taking part; by default those of the initialised process group, or this one
            alone.
        progress: called after each batch.

    Returns:
        The content of results.json on the first rank, None on the others.

    Raises:
        DeloError: see `open_run` and `StoredRun.adapters`; predictions that do not match the questions.
    """
    began = time.monotonic()
    run = open_run(Path(run_dir), request)
    ranks = ranks or current_ranks(run.config)
    cells = cells_of(
        run.sequence, stage, run.patterns_of(stage), needs_task=run.method.capabilities.needs_task
    )
    questions = Questions(run.config)
    check_scorable(run.config, cells, questions)
    with answerer(run, stage, ranks.device) as ready:
        for cell in cells:
            _answer_cell(run, stage, cell, ready, questions, ranks, progress)
    ranks.barrier()
    content = _close_stage(run, stage, cells, questions, ranks.world, began) if ranks.first else None
    ranks.barrier()
    return content


def current_ranks(config: RunConfig) -> Ranks:
    """This process in the initialised process group, or alone, on the device the configuration names."""
    grouped = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    return Ranks(rank, world, resolve_device(config.device))


@contextmanager
def launched_ranks(config: RunConfig) -> Iterator[Ranks]:
    """Join the processes that torchrun or deepspeed started to evaluate only, and leave them at the end.

    The only collective is a barrier, so gloo serves on every device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield current_ranks(config)
        return
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
        )
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield current_ranks(config)
    finally:
        distributed.destroy_process_group()


@contextmanager
def answerer(run: StoredRun, stage: int, device: torch.device) -> Iterator[Answerer]:
    """The run's model after `stage`, loaded for answering and freed at the end."""
    config, adapters = run.config, run.adapters(stage)
    base = run.backbone.load(
        run.model_path, quant=config.quant, dtype=config.dtype, attn=config.attn, device=str(device)
    )
    processor = run.backbone.load_processor(run.model_path)
    collator = Collator(
        run.backbone, processor, config.data.max_length, config.missing.image, generation=True
    )
    ready = Answerer(
        model=run.method.load(base, adapters).eval(),
        method=run.method,
        collate=collator,
        tokenizer=processor.tokenizer,
        device=device,
        trained=tuple(adapters),
        beams=config.eval.num_beams,
        oracle=config.eval.oracle,
    )
    del base
    try:
        yield ready
    finally:
        del ready.model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _answer_cell(
    run: StoredRun,
    stage: int,
    cell: Cell,
    ready: Answerer,
    questions: Questions,
    ranks: Ranks,
    progress: Progress | None,
) -> None:
    """Answer this rank's share of one cell into its part file."""
    asked, scorer = questions.of(cell), scorer_of(cell.task, run.config)

    def rows() -> Iterator[Sequence[Row]]:
        done = 0
        for batch in ready.answers(
            asked, batch_size=run.config.eval.batch_size, max_new_tokens=cell.task.max_new_tokens,
            rank=ranks.rank, world=ranks.world,
        ):  # fmt: skip
            yield [
                prediction_row(question, answer, scorer, stage, cell.pattern) for question, answer in batch
            ]
            done += len(batch)
            if progress is not None:
                progress(f"{cell.task.name}/{cell.pattern}", done, -(-len(asked) // ranks.world))

    write_part(prediction_file(run.output, stage, cell.pattern, cell.task.name), ranks.rank, rows())
    used = use_file(run.output, stage, cell.pattern, cell.task.name)
    write_use_part(used, ranks.rank, run.method.routing_use(ready.model))


def _close_stage(
    run: StoredRun, stage: int, cells: Sequence[Cell], questions: Questions, world: int, began: float
) -> dict[str, Any]:
    """Merge the parts, fill the matrix, write results.json and return its content."""
    results = resume_results(run.output, run.config, tuple(run.sequence.names))
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    results.forget(stage, patterns)
    trained = run.sequence.names[: stage + 1]
    chosen: dict[str, list[Row]] = {pattern: [] for pattern in patterns}
    for cell in cells:
        asked = questions.of(cell)
        rows = merge_parts(prediction_file(run.output, stage, cell.pattern, cell.task.name), asked, world)
        merge_use_parts(use_file(run.output, stage, cell.pattern, cell.task.name))
        scorer, references = scorer_of(cell.task, run.config), [Reference.of(q.record) for q in asked]
        fill_cell(results, run.method, stage, cell, rows, scorer, references)
        results.effective.setdefault(cell.pattern, {})[cell.task.name] = questions.missing(cell)
        if cell.task.name in trained:
            chosen[cell.pattern] += rows
    for pattern, rows in chosen.items():
        results.note_choice(stage, pattern, choice_statistics(rows, run.sequence.names))
    results.eval_seconds[stage] = round(time.monotonic() - began, 3)
    content = results_json(results, run.config, run_facts(run))
    write_results(run.output, content)
    if stage == len(run.sequence.tasks) - 1:
        draw(content, run.output / PLOTS)
    try_report(run.store.root, run.output)
    return content


def fill_cell(
    results: Results,
    method: Method,
    stage: int,
    cell: Cell,
    rows: Sequence[Row],
    scorer: Scorer,
    references: Sequence[Reference],
) -> None:
    """Enter the scores of one cell's predictions into the matrix, for the modes that exist."""
    name, count = cell.task.name, len(rows)

    def score(prediction: str, own: str) -> float:
        if scorer.corpus is None:
            return 100 * sum(float(row[own]) for row in rows) / count
        return 100 * scorer.total([row[prediction] for row in rows], references)

    if stage == ZERO_SHOT or not method.capabilities.needs_task:
        value = score("prediction", "score")
        results.matrix.set("matched", stage, name, value, count=count, pattern=cell.pattern)
    if stage != ZERO_SHOT and all(row["oracle_score"] is not None for row in rows):
        value = score("oracle_prediction", "oracle_score")
        results.matrix.set("oracle", stage, name, value, count=count, pattern=cell.pattern)


def scorer_of(task: TaskSpec, config: RunConfig) -> Scorer:
    """The scorer that the task's recipe names, in the mode the run asks for."""
    return cast(Scorer, load_plugin("scorer", task.scorer)).in_mode(config.eval.scoring)


def check_scorable(config: RunConfig, cells: Sequence[Cell], questions: Questions) -> None:
    """Refuse, before a model is loaded, what could not be scored once it has answered.

    Raises:
        DeloError: see `Scorer.in_mode` and `Scorer.check`.
    """
    for cell in {cell.task.name: cell for cell in cells}.values():
        scorer = scorer_of(cell.task, config)
        if scorer.needs or scorer.ready:
            scorer.check([Reference.of(question.record) for question in questions.of(cell)])


def run_facts(run: StoredRun) -> dict[str, Any]:
    """What training recorded in run.json and results.json repeats; None where it recorded nothing."""
    recorded = run.store.read_run()
    stages = {task: run.store.stage(task) for task in run.sequence.names}
    worlds = [stage["world"] for stage in stages.values() if "world" in stage]
    return {
        "scorer_ids": {task.name: scorer_of(task, run.config).id for task in run.sequence.tasks},
        "world": worlds[-1] if worlds else None,
        "start_weights": {"name": run.config.model, "sha256": recorded.get("base", {}).get("sha256")},
        "data_hashes": recorded.get("data_hashes"),
        "versions": recorded.get("versions"),
        "trainable_parameters_per_task": _recorded(stages, "trainable_parameters"),
        "train_seconds": [stage.get("train_seconds") for stage in stages.values()],
        "missing_train": _recorded(stages, "missing"),
    }


def _recorded(stages: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """One entry of every stage that has it, by task."""
    return {task: stage[key] for task, stage in stages.items() if key in stage}
