"""Tasks kept aside, asked of a stage beside its own cells: what is left of the base's general ability.

They are answered as in real use: a method that chooses a task chooses one of those it learned, and none can
be told. Nothing is missing, whatever the run's pattern. Answers, predictions and scores lie in a folder of
their own, so that none of the run's own numbers depends on them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delo_eval.answers.hashes import told_writing
from delo_eval.answers.predictions import Prediction, prediction_file, prediction_of, write_predictions
from delo_eval.answers.routing_use import merge_use_parts, use_file
from delo_eval.harness.answering import OnProgress, answer_cells
from delo_eval.harness.closing import check_scorable
from delo_eval.harness.facts import scorer_of
from delo_eval.harness.generate import Answerer
from delo_eval.harness.model import StoredRun
from delo_eval.harness.questions import Cell, Questions
from delo_eval.harness.stored import StoredAnswers
from delo_eval.matrix.accuracy import ZERO_SHOT, stage_name
from delo_eval.matrix.derived import cell_score
from delo_eval.matrix.floors import floor_of
from delo_eval.matrix.general import FOLDER, PATTERN, SCHEMA, adapters_of, general_file
from delo_eval.scorers.base import Reference
from delo_llava.data.recipe import load_general
from delo_llava.engines.ranks import Ranks
from delo_llava.files import write_json_atomic


@dataclass
class Aside:
    """The tasks kept aside, for one stage.

    Attributes:
        run: with a folder of its own as output.
        cells: one for each task.
    """

    run: StoredRun
    stage: int
    cells: Sequence[Cell]
    questions: Questions
    stored: StoredAnswers

    @classmethod
    def open(cls, run: StoredRun, stage: int, ranks: Ranks) -> "Aside | None":
        """What to ask after `stage`; None where nothing is asked for, or the method needs a true task there.

        Raises:
            DeloError: the recipe keeps no task aside, data is missing, or could not be scored.
        """
        if not _asks(run, stage):
            return None
        tasks = load_general(run.config.task_seq, run.config.data.root, run.config.data.template)
        chosen = run.config.eval.model_copy(update={"split": "test"})
        config = run.config.model_copy(update={"eval": chosen})
        own = replace(run, config=config, output=run.output / FOLDER)
        cells, questions = [Cell(task, PATTERN) for task in tasks], Questions(config)
        check_scorable(cells, questions)
        stored = StoredAnswers.open(own, stage, ranks)
        if not config.eval.cache:
            ranks.run_first(lambda: stored.forget(cells))
        return cls(own, stage, cells, questions, stored)

    @property
    def rooms(self) -> dict[str, int]:
        """Task -> tokens that an answer may have."""
        return {cell.task.name: cell.task.max_new_tokens for cell in self.cells}

    def answer(self, load: Callable[[], Answerer], ranks: Ranks, progress: OnProgress | None) -> None:
        """Answer what is not answered yet of this rank's share."""
        answer_cells(self.run, self.cells, load, self.questions, self.stored, ranks, progress)

    def close(self) -> set[Path]:
        """Score all ranks' answers and write the stage's file (first rank); returns the files read for it."""
        self.stored.hashes.take_parts()
        content = {
            "schema": SCHEMA,
            "stage": stage_name(self.stage),
            "adapters": adapters_of(self.run.store, self.run.plan, self.stage),
            "pattern": PATTERN,
            "tasks": {cell.task.name: self._scored(cell) for cell in self.cells},
        }
        with told_writing(self.run.output):
            write_json_atomic(general_file(self.run.output.parent, self.stage), content)
        self.stored.hashes.save()
        files = {
            file for cell in self.cells for file in (cell.task.files["test"], *cell.task.beside.values())
        }
        return {*self.stored.hashes.seen, *files}

    def _scored(self, cell: Cell) -> dict[str, Any]:
        """One task's entry; its predictions are written."""
        asked, scorer = self.questions.of(cell), scorer_of(cell.task, self.run.config)
        answers = self.stored.gather(cell, asked)
        rows = [
            prediction_of(question, answer, scorer, self.stage, cell.pattern)
            for question, (_, _, answer) in zip(asked, answers, strict=True)
        ]
        with told_writing(self.run.output):
            file = prediction_file(self.run.output, self.stage, cell.pattern, cell.task.name)
            write_predictions(file, rows)
        merge_use_parts(use_file(self.run.output, self.stage, cell.pattern, cell.task.name))
        references = [Reference.of(question.record) for question in asked]
        said, scores = [row["prediction"] for row in rows], [row["score"] for row in rows]
        value, error = cell_score(said, scores, scorer, references)
        floor = floor_of(scorer, references, cell.task.answers)
        return {
            "score": value,
            "standard_error": error,
            "records": len(rows),
            "scorer": scorer.id,
            "majority": None if floor is None else floor.majority,
            "chosen": _chosen(rows),
        }


def _asks(run: StoredRun, stage: int) -> bool:
    """Whether the tasks kept aside are asked after `stage`: never in a folder that is not the run's own."""
    chosen = run.config.eval
    if not chosen.general or run.output != run.store.root:
        return False
    if stage == ZERO_SHOT:
        return True
    due = stage == run.plan.last or chosen.general_stages == "all"
    return due and not run.method.capabilities.needs_task


def _chosen(rows: Sequence[Prediction]) -> dict[str, float] | None:
    """Task -> share of questions answered as it; None where no task is chosen."""
    used = Counter(row["task_used"] for row in rows if row["task_used"] is not None)
    return {task: count / len(rows) for task, count in used.most_common()} or None
