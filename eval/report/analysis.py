"""What is wrong with wrong answers, as tables: kinds of error by task, and what is mistaken for what."""

from collections.abc import Sequence
from dataclasses import dataclass

from delo_eval.answers import errors
from delo_eval.answers.predictions import prediction_file
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.report.content import RunContent

#: Confusions shown of a task.
TOP = 5


@dataclass(frozen=True)
class Grid:
    """A plain table, whose first `words` columns are text."""

    label: str
    columns: list[str]
    rows: list[list[str]]
    words: int = 1


def error_tables(content: RunContent) -> list[Grid]:
    """Kinds of error and the most frequent confusions of the latest stage; empty before the first.

    Raises:
        DeloError: predictions are damaged.
    """
    stage = content.latest
    if stage is None:
        return []
    tasks = [
        task
        for task in content.tasks[: stage + 1]
        if prediction_file(content.folder, stage, RUN_PATTERN, task).is_file()
    ]
    found = errors.run_errors(content.folder, stage, tasks)
    kinds = {kind: kind.replace("_", " ") for kind in errors.KINDS if any(of.kinds[kind] for of in found)}
    counts = [
        [of.task, f"{of.records:,}", f"{of.wrong:,}", *(str(of.kinds[kind]) for kind in kinds)]
        for of in found
    ]
    pairs = [[of.task, *_pairs(of.confusions)] for of in found if of.confusions]
    meanings = [[words, errors.KINDS[kind]] for kind, words in kinds.items()]
    return [
        Grid("Wrong answers by kind", ["task", "records", "wrong", *kinds.values()], counts),
        Grid("Most frequent confusions", ["task", *map(str, range(1, TOP + 1))], pairs, TOP + 1),
        Grid("What the kinds mean", ["kind", "meaning"], meanings, 2),
    ]


def _pairs(confusions: Sequence[errors.Confusion]) -> list[str]:
    """The first `TOP` as `reference → answer ×count`, padded with blanks."""
    texts = [f"{pair.answer} → {pair.prediction} ×{pair.count}" for pair in confusions[:TOP]]
    return texts + [""] * (TOP - len(texts))
