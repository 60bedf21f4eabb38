"""Two rows on the very same records, for the paired bootstrap."""

import statistics
from collections.abc import Sequence
from typing import cast

import numpy as np

from delo_eval.answers.predictions import Prediction, prediction_file, read_predictions
from delo_eval.compare.comparison import Paired
from delo_eval.compare.runs import RunResults
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.matrix.derived import score_drawn
from delo_eval.matrix.uncertainty import Array, Contrast, Outcomes, paired_bootstrap
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names

#: A score computed from stored predictions may differ from the stored cell by rounding only (percent).
_ROUNDING = 1e-6
#: Most resamples where a task is scored anew, as a whole, for each.
CORPUS_RESAMPLES = 1000


def pair(
    first: tuple[str, Sequence[RunResults]],
    second: tuple[str, Sequence[RunResults]],
    tasks: Sequence[str],
    resamples: int,
) -> Paired:
    """Contrast two rows, given as name and runs, on each task and on the mean of all.

    A task without predictions, of other records, or with a rule that cannot be applied to predictions alone
    has no contrast; then the mean has none either, and the reason says why.
    """
    runs = (*first[1], *second[1])
    known: dict[str, Outcomes] = {}
    reasons: dict[str, list[str]] = {}
    for task in tasks:
        try:
            known[task], anew = _outcomes(runs, task)
            resamples = min(resamples, CORPUS_RESAMPLES) if anew else resamples
        except DeloError as error:
            reasons.setdefault(error.message, []).append(task)
    seeds = [[run.results["seed"] for run in side] for _, side in (first, second)]
    contrasts: list[Contrast] = []
    if known:
        contrasts = paired_bootstrap(
            list(known.values()), len(first[1]), same_seeds=seeds[0] == seeds[1], resamples=resamples
        )
    by_task = dict(zip(known, contrasts, strict=False))
    return Paired(
        first[0],
        second[0],
        {task: by_task.get(task) for task in tasks},
        contrasts[-1] if known and not reasons else None,
        "; ".join(f"{', '.join(those)}: {why}" for why, those in reasons.items()),
    )


def _outcomes(runs: Sequence[RunResults], task: str) -> tuple[Outcomes, bool]:
    """What the runs made of the task's records, and whether a resample scores the task as a whole.

    Raises:
        DeloError: predictions are missing, damaged, of other records, or not those that were scored.
    """
    rows = [_rows(run, task) for run in runs]
    ids = [row["record_id"] for row in rows[0]]
    for run, own in zip(runs, rows, strict=True):
        if [row["record_id"] for row in own] != ids:
            raise DeloError(f"{run.name} and {runs[0].name} were not asked the same records")
    keys = ["score" if run.mode == "matched" else "oracle_score" for run in runs]
    scores = np.array(
        [[row[key] for row in own] for own, key in zip(rows, keys, strict=True)], dtype=np.float64
    )
    cells = [run.scores()[task] for run in runs]
    off = [
        abs(100 * statistics.fmean(own) - cell) > _ROUNDING for own, cell in zip(scores, cells, strict=True)
    ]
    if not any(off):
        return Outcomes.of_means(scores), False
    return _whole(runs, task, rows, cells), True


def _whole(
    runs: Sequence[RunResults], task: str, rows: Sequence[Sequence[Prediction]], cells: Sequence[float]
) -> Outcomes:
    """Outcomes under a rule that is no mean over records, applied to the stored answers and references.

    Raises:
        DeloError: the rule needs more than that, is too slow, or gives other scores than were stored.
    """
    identifier = str(runs[0].results["scorer_ids"][task])
    scorer = scorer_with_id(identifier)
    if scorer is None:
        raise DeloError(
            f"the stored scores are not the mean of the predictions', and {identifier} is not known here"
        )
    if scorer.corpus is None:
        raise DeloError("the stored scores are not the mean of the predictions' scores")
    if not scorer.resamples:
        raise DeloError(f"{identifier} is too slow to be applied to every resample")
    references = [Reference(str(row["record_id"]), row["answer"]) for row in rows[0]]
    scorer.check(references)
    said = [
        [row["prediction" if run.mode == "matched" else "oracle_prediction"] for row in own]
        for run, own in zip(runs, rows, strict=True)
    ]
    observed = np.array([scorer.total(texts, references) for texts in said])
    if np.abs(100 * observed - cells).max() > _ROUNDING:
        raise DeloError(f"{identifier} gives other scores than were stored")

    def draw(resamples: int, random: np.random.Generator) -> Array:
        drawn = (random.integers(len(references), size=len(references)).tolist() for _ in range(resamples))
        return np.array([[score_drawn(scorer, texts, references, d) for texts in said] for d in drawn])

    return Outcomes(observed, len(references), draw)


def scorer_with_id(identifier: str) -> Scorer | None:
    """The installed scorer, native or compat, with this id and version; None when there is none."""
    for name in plugin_names("scorer"):
        native = cast(Scorer, load_plugin("scorer", name))
        for scorer in (native, native.compat):
            if scorer is not None and scorer.id == identifier:
                return scorer
    return None


def _rows(run: RunResults, task: str) -> list[Prediction]:
    """The run's rows after its last finished stage, by record id."""
    rows = read_predictions(prediction_file(run.folder, run.stage, RUN_PATTERN, task))
    if not rows:
        raise DeloError(f"{run.name} has no predictions")
    return sorted(rows, key=lambda row: str(row["record_id"]))
