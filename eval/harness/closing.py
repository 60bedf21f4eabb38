"""The end of a stage's evaluation: its answers scored, predictions and results.json written."""

import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from delo_eval.answers.hashes import told_writing
from delo_eval.answers.predictions import Prediction, prediction_file, prediction_of, write_predictions
from delo_eval.answers.routing_use import merge_use_parts, use_file
from delo_eval.harness.facts import run_facts, scorer_of
from delo_eval.harness.model import StoredRun
from delo_eval.harness.questions import Cell, Questions
from delo_eval.harness.stored import StoredAnswers
from delo_eval.harness.unchanged import write_receipt
from delo_eval.matrix.accuracy import ZERO_SHOT, Mode, stage_name
from delo_eval.matrix.derived import cell_score, choice_statistics, share
from delo_eval.matrix.plots import PLOTS, draw_changed
from delo_eval.matrix.results import Results, read_results, results_json, resume_results, write_results
from delo_eval.report.render import try_report
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.data.omitted import answered_without
from delo_llava.data.tokens import beyond_reach
from delo_llava.methods.base import Method
from delo_llava.runs.identity import encoder_files

logger = logging.getLogger(__name__)


def check_scorable(cells: Sequence[Cell], questions: Questions) -> None:
    """Refuse, before a model is loaded, what could not be scored once it has answered.

    Raises:
        DeloError: see `Scorer.in_mode` and `Questions.check`.
    """
    for cell in {cell.task.name: cell for cell in cells}.values():
        questions.check(cell)


def _close_cell(
    run: StoredRun, stage: int, cell: Cell, questions: Questions, stored: StoredAnswers, results: Results
) -> list[Prediction]:
    """Score one cell's answers into `results`, write its predictions and return them."""
    asked, scorer = questions.of(cell), scorer_of(cell.task, run.config)
    rows = [
        prediction_of(q, answer, scorer, stage, cell.pattern)
        for q, (_, _, answer) in zip(asked, stored.gather(cell, asked), strict=True)
    ]
    with told_writing(run.output):
        write_predictions(prediction_file(run.output, stage, cell.pattern, cell.task.name), rows)
    references = [Reference.of(question.record) for question in asked]
    fill_cell(results, run.method, stage, cell, rows, scorer, references)
    results.note_floor(cell.task.name, scorer, references, cell.task.answers)
    unseen = [row["record_id"] for row in rows if "image_fault" in row]
    results.note_bad_images(stage, cell.pattern, cell.task.name, unseen)
    accepted, kit = [scorer.accepted(question.record) for question in asked], run.processor
    long = beyond_reach(kit.tokenizer, kit.dialogue, accepted, cell.task.max_new_tokens)
    results.note_omitted(
        stage, cell.pattern, cell.task.name, answered_without(rows, sum(long), questions.left_out(cell.task))
    )
    merge_use_parts(use_file(run.output, stage, cell.pattern, cell.task.name))
    results.effective.setdefault(cell.pattern, {})[cell.task.name] = questions.missing(cell)
    return rows


def close_stage(
    run: StoredRun,
    stage: int,
    cells: Sequence[Cell],
    questions: Questions,
    stored: StoredAnswers,
    differs: list[str],
    began: float,
    aside: Collection[Path] = (),
) -> dict[str, Any]:
    """Score the answers, write predictions and results.json, and return the content of that.

    Args:
        differs: how base or data differ from the run's own.
        aside: files that were read for tasks kept aside.
    """
    stored.hashes.take_parts()
    before = read_results(run.output)
    results = resume_results(run.output, run.config, run.plan)
    results.differs = list(dict.fromkeys([*results.differs, *differs]))
    _forget_other_rules(results, before, run)
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    results.forget(stage, patterns)
    trained = run.plan.seen(stage)
    chosen: dict[str, list[Prediction]] = {pattern: [] for pattern in patterns}
    count, written = 0, []
    for cell in cells:
        rows = _close_cell(run, stage, cell, questions, stored, results)
        written.append(prediction_file(run.output, stage, cell.pattern, cell.task.name))
        count += len(rows)
        if cell.task.name in trained:
            chosen[cell.pattern] += rows
    for pattern, rows in chosen.items():
        results.note_choice(stage, pattern, choice_statistics(rows, run.sequence.names))
    results.answers[stage_name(stage)] = {"stored": count - stored.new, "new": stored.new}
    results.eval_seconds[stage] = round(time.monotonic() - began, 3)
    content = results_json(results, run.config, run_facts(run))
    with told_writing(run.output):
        write_results(run.output, content)
        if stage == run.plan.last:
            draw_changed(before, content, run.output / PLOTS)
    stored.hashes.save()
    if Path(run.model_path).is_dir():  # what a name on the hub stands for may change without a trace here
        write_receipt(
            run, stage, results,
            plugins=run.plugins,
            read={
                *stored.hashes.seen,
                *aside,
                *(file for cell in cells for file in _files(run, cell)),
                *(file for folder in run.method.capabilities.encoders for file in encoder_files(folder)),
            },
            written=written, answers=count,
        )  # fmt: skip
    try_report(run.store.root, run.output)
    return content


def _forget_other_rules(results: Results, before: dict[str, Any] | None, run: StoredRun) -> None:
    """Drop the scores of tasks that an earlier evaluation judged by another rule, and say so: rows of two
    rules make no matrix.
    """
    known, now = (before or {}).get("scorer_ids") or {}, run_facts(run)["scorer_ids"]
    changed = [task for task, rule in now.items() if known.get(task, rule) != rule]
    if changed:
        results.matrix.clear_tasks(changed)
        rules = ", ".join(f"{task}: {known[task]} became {now[task]}" for task in changed)
        logger.warning(
            "Other rules score now (%s): earlier scores are dropped. To score the stored answers "
            "again: delo-eval --run %s --stage all (and zero-shot)", rules, run.store.root,
        )  # fmt: skip


def _files(run: StoredRun, cell: Cell) -> list[Path]:
    """The files that a cell's records come from."""
    return [cell.task.files[run.config.eval.split], *cell.task.beside.values()]


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
