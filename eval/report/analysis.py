"""What is wrong with wrong answers, as tables: kinds of error by task, and what is mistaken for what."""

from collections.abc import Sequence

from delo_eval.answers import errors
from delo_eval.answers.predictions import prediction_file
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.report.content import RunContent
from delo_eval.tables import Sheet

#: Confusions shown of a task.
TOP = 5


def error_tables(content: RunContent) -> list[Sheet]:
    """Kinds of error and the most frequent confusions of the latest stage; empty before the first.

    Raises:
        DeloError: predictions are damaged.
    """
    stage = content.latest
    if stage is None:
        return []
    tasks = [
        task
        for task in content.plan.judged(stage)
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
        Sheet("Wrong answers by kind", ["task", "records", "wrong", *kinds.values()], counts),
        Sheet("Most frequent confusions", ["task", *map(str, range(1, TOP + 1))], pairs, TOP + 1),
        Sheet("What the kinds mean", ["kind", "meaning"], meanings, 2),
    ]


def _pairs(confusions: Sequence[errors.Confusion]) -> list[str]:
    """The first `TOP` as `reference → answer ×count`, padded with blanks."""
    texts = list(map(str, confusions[:TOP]))
    return texts + [""] * (TOP - len(texts))
