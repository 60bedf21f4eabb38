"""Scores of two rows on the very same records, for the paired bootstrap."""

import statistics
from collections.abc import Sequence

import numpy as np

from delo_eval.comparison import Paired
from delo_eval.matrix import RUN_PATTERN
from delo_eval.predictions import prediction_file, read_rows
from delo_eval.rows import Run
from delo_eval.uncertainty import Array, Contrast, paired_bootstrap
from delo_llava.errors import DeloError

#: A mean of stored scores may differ from the stored cell by rounding only (percent).
_ROUNDING = 1e-6


def pair(
    first: tuple[str, Sequence[Run]], second: tuple[str, Sequence[Run]], tasks: Sequence[str], resamples: int
) -> Paired:
    """Contrast two rows, given as name and runs, on each task and on the mean of all.

    A task without predictions, with other records or with a score that is no mean over records has no
    contrast; then the mean has none either, and the reason says why.
    """
    sides: dict[str, tuple[Array, Array]] = {}
    reasons: list[str] = []
    for task in tasks:
        try:
            sides[task] = _aligned(first[1], second[1], task)
        except DeloError as error:
            reasons.append(f"{task}: {error.message}")
    seeds = [[run.results["seed"] for run in runs] for _, runs in (first, second)]
    contrasts: list[Contrast] = (
        paired_bootstrap(
            [a for a, _ in sides.values()],
            [b for _, b in sides.values()],
            same_seeds=seeds[0] == seeds[1],
            resamples=resamples,
        )
        if sides
        else []
    )
    by_task = dict(zip(sides, contrasts, strict=False))
    return Paired(
        first[0],
        second[0],
        {task: by_task.get(task) for task in tasks},
        contrasts[-1] if sides and not reasons else None,
        "; ".join(reasons),
    )


def _aligned(first: Sequence[Run], second: Sequence[Run], task: str) -> tuple[Array, Array]:
    """S₁×N and S₂×N scores of the same N records.

    Raises:
        DeloError: predictions are missing, damaged or older than the results, or of other records.
    """
    read = [_scores(run, task) for run in (*first, *second)]
    ids = read[0][0]
    for (other, _), run in zip(read, (*first, *second), strict=True):
        if other != ids:
            raise DeloError(f"{run.name} and {first[0].name} were not asked the same records")
    scores = np.array([values for _, values in read], dtype=np.float64)
    return scores[: len(first)], scores[len(first) :]


def _scores(run: Run, task: str) -> tuple[list[str], list[float]]:
    """Record ids, sorted, and their scores after the last finished stage."""
    rows = read_rows(prediction_file(run.folder, run.stages - 1, RUN_PATTERN, task))
    key = "score" if run.mode == "matched" else "oracle_score"
    pairs = sorted(((row["record_id"], row[key]) for row in rows), key=lambda pair: str(pair[0]))
    values = [value for _, value in pairs]
    cell = run.last(run.results["matrix"][run.mode])[task]
    if not values or abs(100 * statistics.fmean(values) - cell) > _ROUNDING:
        raise DeloError(
            f"the predictions of {run.name} do not average to its score: they are not those that were "
            f"scored, or {run.results['scorer_ids'][task]} is no mean over records"
        )
    return [identifier for identifier, _ in pairs], values
