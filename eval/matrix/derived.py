"""What `results.json` derives from cells and predictions: metrics, statistics of task choices."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from delo_eval.matrix.accuracy import MODES, AccuracyMatrix
from delo_eval.matrix.uncertainty import bootstrap_error, standard_error
from delo_eval.metrics.base import metrics
from delo_eval.scorers.base import Reference, Scorer


def summarise(matrix: AccuracyMatrix) -> dict[str, Any]:
    """Every metric for both modes, over the stages that are finished.

    Returns:
        `matched` and `oracle`: metric name -> value or None (undefined for one task or for these stages,
            cells not run, mode not run);
        `stages`: k per mode, the number of finished stages they were computed on; `complete`: all of them
            are, in some mode, and the base was evaluated where none is planned.
    """
    whole = matrix.plan.one_task_each
    known = {name: metric if whole or metric.of_result else None for name, metric in metrics().items()}
    result: dict[str, Any] = {}
    for mode in MODES:
        grid, zero_shot = matrix.finished_part(mode)
        result[mode] = {
            name: metric(grid, zero_shot) if metric and len(grid) else None for name, metric in known.items()
        }
    stages = {mode: matrix.finished_stages(mode) for mode in MODES}
    complete = matrix.plan.last in [matrix.result_stage(mode) for mode in MODES]
    return {**result, "stages": stages, "complete": complete}


def cell_score(
    predictions: Sequence[str], scores: Sequence[float], scorer: Scorer, references: Sequence[Reference]
) -> tuple[float, float | None]:
    """The score of one cell in percent, and its standard error over records.

    Args:
        predictions, references: in the order of the file.
        scores: of each prediction, in [0, 1].

    Returns:
        the mean with the standard error of a mean; for rules that are no mean over records what the rule says
        of all, with a bootstrap error. The error is None for a single record.
    """
    if scorer.corpus is None:
        return 100 * sum(map(float, scores)) / len(scores), standard_error(scores)
    drawn = partial(score_drawn, scorer, predictions, references)
    return 100 * scorer.total(predictions, references), bootstrap_error(
        drawn, len(predictions), resamples=scorer.resamples
    )


def score_drawn(
    scorer: Scorer, predictions: Sequence[str], references: Sequence[Reference], drawn: Sequence[int]
) -> float:
    """The rule applied to drawn records; one drawn again gets an id of its own, as rules may go by id."""
    again = [replace(references[i], id=f"{references[i].id}#{k}") for k, i in enumerate(drawn)]
    return scorer.total([predictions[i] for i in drawn], again)


def share(flags: Sequence[float | None]) -> float | None:
    """The mean of flags in percent; None where any is not known."""
    known = [float(flag) for flag in flags if flag is not None]
    return 100 * sum(known) / len(known) if known and len(known) == len(flags) else None


def oracle_gap(matrix: AccuracyMatrix) -> dict[str, float] | None:
    """Task -> oracle − matched after the last stage finished in both modes, in points; None without both.

    What the method loses by choosing tasks itself.
    """
    k = min(matrix.finished_stages(mode) for mode in MODES)
    if not k:
        return None
    pairs = zip(matrix.tasks, matrix.row("oracle", k - 1), matrix.row("matched", k - 1), strict=True)
    seen = matrix.plan.seen(k - 1)
    return {
        task: told - chosen
        for task, told, chosen in pairs
        if task in seen and told is not None and chosen is not None
    }


def choice_statistics(
    predictions: Iterable[Mapping[str, Any]], tasks: Sequence[str]
) -> dict[str, Any] | None:
    """Accuracy (percent) and confusion of the task choice over prediction records of trained tasks.

    Args:
        predictions: prediction records; those without a choice are left out.
        tasks: names in order; row = true task, column = chosen task.

    Returns:
        accuracy, confusion (counts) and fallback (task -> how many of its records gave no evidence, so that
        they were answered, and are counted here, as the first trained task), each with all views and without
        the instruction; None without any choice. Records for which the method failed to choose (void) are in
        no column of the confusion, and wrong: the accuracy is of all records.
    """
    predictions = list(predictions)
    chosen = [p for p in predictions if p["task_used"] is not None]
    if not chosen:
        return None
    full, blind = (
        _confusion(((p["task"], p[key]) for p in chosen if void not in p.get("fallback", ())), tasks)
        for key, void in (("task_used", "void"), ("task_without_instruction", "void_without_instruction"))
    )
    return {
        "accuracy": _accuracy(full, len(chosen)),
        "accuracy_without_instruction": _accuracy(blind, len(chosen)),
        "confusion": full,
        "confusion_without_instruction": blind,
        "fallback": _fallbacks(predictions, "task_used"),
        "fallback_without_instruction": _fallbacks(predictions, "task_without_instruction"),
        "void": _fallbacks(predictions, "void"),
        "void_without_instruction": _fallbacks(predictions, "void_without_instruction"),
    }


def _fallbacks(predictions: Iterable[Mapping[str, Any]], choice: str) -> dict[str, int]:
    """Task -> how many of its records have no choice for this reason; only tasks with any."""
    return dict(Counter(p["task"] for p in predictions if choice in p.get("fallback", ())))


def _confusion(pairs: Iterable[tuple[str, str]], tasks: Sequence[str]) -> list[list[int]]:
    """T×T counts, row = true, column = chosen."""
    place = {task: i for i, task in enumerate(tasks)}
    counts = [[0] * len(tasks) for _ in tasks]
    for true, chosen in pairs:
        counts[place[true]][place[chosen]] += 1
    return counts


def _accuracy(confusion: list[list[int]], records: int) -> float:
    """Percent of all records on the diagonal."""
    return 100 * sum(row[i] for i, row in enumerate(confusion)) / records
