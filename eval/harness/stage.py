"""Evaluate one saved stage: in training and by itself, by the same function, with the same numbers."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed

from delo_eval.answers.hashes import FileHashes, told_writing
from delo_eval.answers.keys import AnswerKeys, model_facts
from delo_eval.answers.predictions import Prediction, prediction_file, prediction_of, write_predictions
from delo_eval.answers.question import Question
from delo_eval.answers.routing_use import merge_use_parts, use_file, write_use_part
from delo_eval.answers.store import CellAnswers, StoredAnswer
from delo_eval.harness.facts import run_facts, scorer_of
from delo_eval.harness.folder import AS_STORED, Request, RunFolder, open_folder
from delo_eval.harness.generate import Answerer, batches
from delo_eval.harness.questions import Cell, Questions, cells_of
from delo_eval.harness.unchanged import unchanged_stage, write_receipt
from delo_eval.matrix.accuracy import ZERO_SHOT, Mode, stage_name
from delo_eval.matrix.derived import cell_score, choice_statistics, share
from delo_eval.matrix.plots import PLOTS, draw_changed
from delo_eval.matrix.results import Results, read_results, results_json, resume_results, write_results
from delo_eval.report.render import try_report
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.backbones.base import Backbone, find_backbone, resolve_device
from delo_llava.config import RunConfig, with_methods
from delo_llava.data.collate import Collator
from delo_llava.engines.ranks import PATIENCE, Ranks
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Past
from delo_llava.registry import load_plugin

#: (cell being evaluated, questions done, questions in all), of this rank.
OnProgress = Callable[[str, int, int], None]


@dataclass
class StoredRun(RunFolder):
    """A run's folder with what it takes to answer."""

    backbone: Backbone
    model_path: str
    method: Method


def open_run(run_dir: Path, request: Request = AS_STORED) -> StoredRun:
    """Read a run's stored configuration and find its method and base; no model is loaded.

    Raises:
        DeloError: no run there, data or model gone, or an impossible request.
    """
    found = open_folder(run_dir, request)
    config = with_methods(found.config)
    backbone, path = find_backbone(config.model)
    kind = cast(type[Method], load_plugin("method", config.method))
    method = kind(kind.Config(**config.methods.get(config.method, {})), config, backbone)
    return StoredRun(
        found.store, config, found.sequence, found.output, found.patterns, backbone, path, method
    )


def evaluate_stage(
    run_dir: Path,
    stage: int,
    *,
    request: Request = AS_STORED,
    ranks: Ranks | None = None,
    progress: OnProgress | None = None,
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
        DeloError: see `open_run` and `RunFolder.adapters`; an image or a record that cannot be used; a disk
            that takes no more.
        Preempted: on every rank, if a signal asked any of them to leave; the answers so far are kept.
    """
    began = time.monotonic()
    run = open_run(Path(run_dir), request)
    ranks = ranks or current_ranks(run.config)
    if ranks.world == 1 and (content := unchanged_stage(Path(run_dir), stage, request)) is not None:
        return content
    needs_task = run.method.capabilities.needs_task
    cells = cells_of(run.sequence, stage, run.patterns_of(stage), needs_task=needs_task)
    cells.sort(key=lambda cell: run.sequence.names.index(cell.task.name))  # each task's records are read once
    questions = Questions(run.config)
    check_scorable(run.config, cells, questions)
    stored = StoredAnswers.open(run, stage, ranks)
    if not run.config.eval.cache:
        ranks.run_first(lambda: stored.forget(cells))
    with ExitStack() as stack:
        load = cache(lambda: stack.enter_context(answerer(run, stage, ranks.device)))
        for cell in cells:
            if ranks.leave_soon():
                break
            _answer_cell(run, cell, load, questions, stored, ranks, progress)
    stored.hashes.save()
    ranks.leave_if_asked(f"evaluating stage {stage_name(stage)}")
    stored.new = int(ranks.sum(torch.tensor(stored.new)))
    content = _close_stage(run, stage, cells, questions, stored, began) if ranks.first else None
    ranks.barrier()
    return content


@dataclass
class StoredAnswers:
    """The answers to one stage's questions that are on disk, for all its cells.

    Attributes:
        new: answers that this process gave.
    """

    output: Path
    stage: int
    keys: AnswerKeys
    hashes: FileHashes
    skips_bad_images: bool
    new: int = 0
    _cells: dict[tuple[str, str], CellAnswers] = field(default_factory=dict)

    @classmethod
    def open(cls, run: StoredRun, stage: int, ranks: Ranks) -> "StoredAnswers":
        """What the run answered after `stage`; every adapter is proven unchanged.

        Raises:
            DeloError: see `StoredRun.adapters`.
        """
        hashes = FileHashes(run.output, ranks.rank)
        facts = model_facts(
            run.config, run.method, run.backbone, run.model_path, run.adapters(stage), ranks.device.type,
            hashes,
        )  # fmt: skip
        skips = run.config.data.on_bad_image == "skip"
        return cls(run.output, stage, AnswerKeys(facts, hashes), hashes, skips)

    def of(self, cell: Cell) -> CellAnswers:
        """The file of one cell."""
        name = cell.pattern, cell.task.name
        return self._cells.setdefault(name, CellAnswers(self.output, self.stage, *name))

    def known(self, file: CellAnswers) -> dict[str, StoredAnswer]:
        """Key -> entry; an image that could not be used is looked at again where that is an error."""
        return {
            key: entry
            for key, entry in file.read().items()
            if self.skips_bad_images or entry[2].image_fault is None
        }

    def forget(self, cells: Sequence[Cell]) -> None:
        """Drop what is stored of `cells`."""
        for cell in cells:
            self.of(cell).forget()


def current_ranks(config: RunConfig) -> Ranks:
    """This process in the initialised process group, or alone, on the device the configuration names."""
    grouped = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    return Ranks(rank, world, resolve_device(config.device))


@contextmanager
def launched_ranks(config: RunConfig) -> Iterator[Ranks]:
    """Join the processes that torchrun or deepspeed started to evaluate only, and leave them at the end.

    Collectives are few and tiny (barriers, a count), so gloo serves on every device.
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
        model=run.method.load(base, {name: Past(folder) for name, folder in adapters.items()}).eval(),
        method=run.method,
        collate=collator,
        tokenizer=processor.tokenizer,
        device=device,
        trained=tuple(adapters),
        beams=config.eval.num_beams,
        oracle=config.eval.oracle,
        skip_bad_images=config.data.on_bad_image == "skip",
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
    cell: Cell,
    load: Callable[[], Answerer],
    questions: Questions,
    stored: StoredAnswers,
    ranks: Ranks,
    progress: OnProgress | None,
) -> None:
    """Answer what is not answered yet of this rank's share of one cell; the model is loaded if there is any.

    A batch of which any answer is lacking is decoded as a whole, since in low precision the last bits depend
    on what is decoded together; of its answers only those that were lacking are taken.
    """
    file, tokens = stored.of(cell), cell.task.max_new_tokens
    known, name = stored.known(file), f"{cell.task.name}/{cell.pattern}"
    share = batches(questions.of(cell), run.config.eval.batch_size)[ranks.rank :: ranks.world]
    keyed = [[(stored.keys.of(question, tokens), question) for question in batch] for batch in share]
    left = [batch for batch in keyed if any(key not in known for key, _ in batch)]
    total = sum(map(len, keyed))
    done = total - sum(map(len, left))
    if progress is not None:
        progress(name, done, total)
    if not left:
        return
    with file.writer(ranks.rank) as part:
        for batch in left:
            answers = load().answer([question for _, question in batch], tokens)
            lacking = [
                (key, question.record.id, answer)
                for (key, question), answer in zip(batch, answers, strict=True)
                if key not in known
            ]
            part.append(lacking)
            stored.new += len(lacking)
            done += len(batch)
            if progress is not None:
                progress(name, done, total)
            if ranks.leave_soon():
                break
    used = use_file(run.output, stored.stage, cell.pattern, cell.task.name)
    write_use_part(used, ranks.rank, run.method.routing_use(load().model))


def _close_stage(
    run: StoredRun,
    stage: int,
    cells: Sequence[Cell],
    questions: Questions,
    stored: StoredAnswers,
    began: float,
) -> dict[str, Any]:
    """Score the answers, write predictions and results.json, and return the content of that."""
    stored.hashes.take_parts()
    before = read_results(run.output)
    results = resume_results(run.output, run.config, tuple(run.sequence.names))
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    results.forget(stage, patterns)
    trained = run.sequence.names[: stage + 1]
    chosen: dict[str, list[Prediction]] = {pattern: [] for pattern in patterns}
    count, written = 0, []
    for cell in cells:
        asked, scorer = questions.of(cell), scorer_of(cell.task, run.config)
        answers = _gather(stored, cell, asked)
        rows = [
            prediction_of(q, answer, scorer, stage, cell.pattern)
            for q, (_, _, answer) in zip(asked, answers, strict=True)
        ]
        written.append(prediction_file(run.output, stage, cell.pattern, cell.task.name))
        with told_writing(run.output):
            write_predictions(written[-1], rows)
        fill_cell(results, run.method, stage, cell, rows, scorer, [Reference.of(q.record) for q in asked])
        count += len(rows)
        unseen = [row["record_id"] for row in rows if "image_fault" in row]
        results.note_bad_images(stage, cell.pattern, cell.task.name, unseen)
        merge_use_parts(use_file(run.output, stage, cell.pattern, cell.task.name))
        results.effective.setdefault(cell.pattern, {})[cell.task.name] = questions.missing(cell)
        if cell.task.name in trained:
            chosen[cell.pattern] += rows
    for pattern, rows in chosen.items():
        results.note_choice(stage, pattern, choice_statistics(rows, run.sequence.names))
    results.answers[stage_name(stage)] = {"stored": count - stored.new, "new": stored.new}
    results.eval_seconds[stage] = round(time.monotonic() - began, 3)
    content = results_json(results, run.config, run_facts(run))
    with told_writing(run.output):
        write_results(run.output, content)
        if stage == len(run.sequence.tasks) - 1:
            draw_changed(before, content, run.output / PLOTS)
    stored.hashes.save()
    if Path(run.model_path).is_dir():  # what a name on the hub stands for may change without a trace here
        write_receipt(
            run, stage, results,
            modules={type(run.method).__module__, type(run.backbone).__module__},
            read={*stored.hashes.seen, *(cell.task.files[run.config.eval.split] for cell in cells)},
            written=written, answers=count,
        )  # fmt: skip
    try_report(run.store.root, run.output)
    return content


def _gather(stored: StoredAnswers, cell: Cell, asked: Sequence[Question]) -> list[StoredAnswer]:
    """The answers of all ranks to one cell's questions, in their order, joined into one file.

    Raises:
        DeloError: a question has none.
    """
    file = stored.of(cell)
    known = stored.known(file)
    keys = [stored.keys.of(question, cell.task.max_new_tokens) for question in asked]
    lacking = [q.record.id for key, q in zip(keys, asked, strict=True) if key not in known]
    if lacking:
        raise DeloError(
            f"{len(lacking)} of {len(asked)} questions of {cell.task.name}/{cell.pattern} have no answer, "
            f"such as {lacking[:5]}.",
            given=file.file,
            fix="evaluate this stage again; the answers that are there stay",
        )
    file.join(stored.keys.context, keys, known)
    return [known[key] for key in keys]


def fill_cell(
    results: Results,
    method: Method,
    stage: int,
    cell: Cell,
    rows: Sequence[Prediction],
    scorer: Scorer,
    references: Sequence[Reference],
) -> None:
    """Enter the scores of one cell's predictions into the matrix, for the modes that exist."""
    name, count = cell.task.name, len(rows)

    def enter(mode: Mode, prediction: str, own: str, follows: str) -> None:
        value, error = cell_score(
            [row[prediction] for row in rows], [row[own] for row in rows], scorer, references
        )
        results.matrix.set(mode, stage, name, value, count=count, pattern=cell.pattern)
        results.matrix.note("standard_errors", mode, stage, name, error, pattern=cell.pattern)
        rate = share([row.get(follows) for row in rows])
        results.matrix.note("instruction_following", mode, stage, name, rate, pattern=cell.pattern)

    if stage == ZERO_SHOT or not method.capabilities.needs_task:
        enter("matched", "prediction", "score", "follows")
    if stage != ZERO_SHOT and all(row["oracle_score"] is not None for row in rows):
        enter("oracle", "oracle_prediction", "oracle_score", "oracle_follows")


def check_scorable(config: RunConfig, cells: Sequence[Cell], questions: Questions) -> None:
    """Refuse, before a model is loaded, what could not be scored once it has answered.

    Raises:
        DeloError: see `Scorer.in_mode` and `Scorer.check`.
    """
    for cell in {cell.task.name: cell for cell in cells}.values():
        scorer = scorer_of(cell.task, config)
        if scorer.needs or scorer.ready:
            scorer.check([Reference.of(question.record) for question in questions.of(cell)])
