"""Evaluate one saved stage: in training and by itself, by the same function, with the same numbers."""

import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch

from delo_eval.harness.answering import OnProgress, answer_cells
from delo_eval.harness.closing import check_scorable, close_stage
from delo_eval.harness.folder import AS_STORED, Request
from delo_eval.harness.general import Aside
from delo_eval.harness.identity import require_same
from delo_eval.harness.model import answerer, open_run
from delo_eval.harness.questions import Questions, cells_of
from delo_eval.harness.ranks import current_ranks
from delo_eval.harness.stored import StoredAnswers
from delo_eval.harness.unchanged import unchanged_stage
from delo_eval.matrix.accuracy import stage_name
from delo_llava.engines.ranks import Ranks


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
    cells = cells_of(run.sequence, run.plan, stage, run.patterns_of(stage), needs_task=needs_task)
    cells.sort(key=lambda cell: run.sequence.names.index(cell.task.name))  # each task's records are read once
    elsewhere, tasks = request.output is not None, {cell.task.name for cell in cells}
    differs: list[str] = []
    ranks.run_first(lambda: differs.extend(require_same(run, tasks, elsewhere)))
    questions = Questions(run.config)
    check_scorable(cells, questions)
    stored = StoredAnswers.open(run, stage, ranks)
    aside = Aside.open(run, stage, ranks)
    if not run.config.eval.cache:
        ranks.run_first(lambda: stored.forget(cells))
    rooms = run.sequence.rooms | (aside.rooms if aside else {})
    with ExitStack() as stack:
        load = cache(lambda: stack.enter_context(answerer(run, stage, ranks.device, rooms)))
        answer_cells(run, cells, load, questions, stored, ranks, progress)
        if aside is not None:
            aside.answer(load, ranks, progress)
    ranks.leave_if_asked(f"evaluating stage {stage_name(stage)}")
    stored.new = int(ranks.sum(torch.tensor(stored.new)))
    content = None
    if ranks.first:
        read = aside.close() if aside is not None else ()
        content = close_stage(run, stage, cells, questions, stored, differs, began, read)
    ranks.barrier()
    return content
