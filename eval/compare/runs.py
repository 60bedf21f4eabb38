"""Rows of a comparison out of run folders: which runs are seeds of one thing, and what the row says."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delo_eval.compare.comparison import BoardRow, Value
from delo_eval.compare.protocol import (
    MISSING_SEED,
    Protocol,
    differences,
    flat,
    protocol,
    without_missing_seed,
)
from delo_eval.matrix.accuracy import RUN_PATTERN, Beside, Cells
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import (
    FILE,
    ResultsJson,
    beside_row,
    judged_mode,
    read_results,
    result_stage,
    score_row,
)
from delo_llava.errors import DeloError
from delo_llava.schema import read_yaml

#: Settings that decide where and how fast a run goes, not what it computes; `eval.` is in the protocol.
NOT_SETTINGS = ("seed", MISSING_SEED, "output", "device", "data.root", "train.log_every", "train.tensorboard")


@dataclass(frozen=True)
class RunResults:
    """One run's results.

    Attributes:
        name: of its folder, made unique by its parents' names.
        results: the content of results.json.
        settings: the run's configuration in dotted names, without seeds and places; empty without a
            config.yaml.
    """

    name: str
    folder: Path
    results: ResultsJson
    settings: Mapping[str, Any]

    @property
    def mode(self) -> str:
        """`matched` or `oracle`."""
        return judged_mode(self.results)

    @property
    def plan(self) -> Plan:
        """The stages."""
        return Plan.read(self.results)

    @property
    def stages(self) -> int:
        """Number of finished stages."""
        return int(self.results["metrics"]["stages"][self.mode])

    @property
    def stage(self) -> int:
        """The stage whose row is the result: the last finished one, or the base where none is planned."""
        return self.require_result()

    def require_result(self) -> int:
        """`stage`.

        Raises:
            DeloError: nothing is finished.
        """
        found = result_stage(self.results, self.mode)
        if found is None:
            raise DeloError("No stage of this run is evaluated.", given=self.folder, fix="evaluate it first")
        return found

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the result: all that were seen by then."""
        return self.plan.judged(self.stage)

    @property
    def protocol(self) -> Protocol:
        """What must be the same in all rows, with the tasks that the numbers stand on."""
        return {**protocol(self.results), "tasks_seen": list(self.tasks)}

    def scores(self, pattern: str = RUN_PATTERN) -> dict[str, float]:
        """Task -> score of the result."""
        return self._known(score_row(self.results, pattern, self.mode, self.stage))

    def beside(self, name: Beside) -> dict[str, float]:
        """Task -> what else is known of its score."""
        return self._known(beside_row(self.results, name, RUN_PATTERN, self.mode, self.stage))

    def _known(self, row: Cells) -> dict[str, float]:
        cells = dict(zip(self.results["tasks"], row, strict=True))
        return {task: cell for task in self.tasks if (cell := cells[task]) is not None}


def load_runs(folders: Sequence[Path]) -> list[RunResults]:
    """Read the runs.

    Raises:
        DeloError: a folder without results, without a finished stage, or named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) != len(resolved):
        raise DeloError("A run is named twice.", given=[str(folder) for folder in folders])
    names = _unique([folder.parts for folder in resolved])
    runs = [_load(folder, name) for folder, name in zip(resolved, names, strict=True)]
    for run in runs:
        run.require_result()
    return runs


def seed_groups(runs: Sequence[RunResults]) -> list[list[RunResults]]:
    """Runs that differ in nothing but their seeds, each group in the order of seeds.

    A second run with the same seed is no further seed and gets a group of its own.
    """
    groups: dict[tuple[str, int], list[RunResults]] = {}
    repeated: dict[tuple[str, Any], int] = {}
    for run in runs:
        alike = (run.results["method"], without_missing_seed(run.protocol), dict(run.settings))
        key = json.dumps(alike, sort_keys=True, default=str)
        seed = run.results["seed"]
        turn = repeated.get((key, seed), 0)
        repeated[key, seed] = turn + 1
        groups.setdefault((key, turn), []).append(run)
    return [sorted(group, key=lambda run: run.results["seed"]) for group in groups.values()]


def labels(groups: Sequence[Sequence[RunResults]]) -> list[str]:
    """A name for each row: the method, with the settings (or the run) in which rows of one method differ."""
    first = [group[0] for group in groups]
    found = [_label(run, [other for other in first if other.results["method"] == run.results["method"]])
             for run in first]  # fmt: skip
    return [
        label if found.count(label) == 1 else f"{run.results['method']} ({run.name})"
        for label, run in zip(found, first, strict=True)
    ]


def _label(run: RunResults, rivals: Sequence[RunResults]) -> str:
    """The method, and what tells the run from others of the same method; at most two settings are told."""
    method = str(run.results["method"])
    if len(rivals) == 1:
        return method
    apart = differences({rival.name: dict(rival.settings) for rival in rivals})
    told = [f"{d.field.removeprefix(f'methods.{method}.')}={run.settings.get(d.field)}" for d in apart]
    return f"{method} ({', '.join(told) if 0 < len(told) <= 2 else run.name})"


def row_protocol(group: Sequence[RunResults]) -> Protocol:
    """The protocol of a row; several seeds have a list of missing seeds."""
    found = group[0].protocol
    if MISSING_SEED not in found or len(group) == 1:
        return found
    return {**found, MISSING_SEED: [run.protocol[MISSING_SEED] for run in group]}


def row_of(group: Sequence[RunResults], name: str) -> BoardRow:
    """The row of runs that differ only in their seed."""
    first = group[0]
    return BoardRow(
        name=name,
        method=first.results["method"],
        mode=first.mode,
        scores=_by_key(group, _scores, _errors),
        metrics=_by_key(group, _metrics, _metric_errors),
        runs=tuple(run.name for run in group),
        folders=tuple(run.folder for run in group),
        seeds=tuple(run.results["seed"] for run in group),
        patterns=_by_key(group, _patterns),
        oracle_gap=_by_key(group, lambda run: run.results.get("oracle_gap") or {}),
        extras=_by_key(group, _extras),
        notes=tuple(dict.fromkeys(note for run in group for note in _notes(run))),
        passports=tuple(run.results.get("passport") for run in group),
    )


def _notes(run: RunResults) -> Iterator[str]:
    """What a reader must know of a run beside its settings."""
    if run.plan.about:
        yield run.plan.about
    if run.results.get("differs"):
        yield f"answered by another base or on other data than the run's: {'; '.join(run.results['differs'])}"
    for change in run.results.get("changes") or []:
        yield f"{change['key']} was changed after {', '.join(change['after']) or 'the first checkpoint'}"


def spread(values: Sequence[float], errors: Sequence[float] = ()) -> Value:
    """Mean, sample standard deviation and mean error of a number over runs."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Value(statistics.fmean(values), std, statistics.fmean(errors) if errors else None, tuple(values))


def _by_key(
    group: Sequence[RunResults],
    of: Callable[[RunResults], Mapping[str, float]],
    errors: Callable[[RunResults], Mapping[str, float]] = lambda run: {},
) -> dict[str, Value]:
    """Key -> value over the runs, for the keys that all runs have."""
    found, uncertain = [of(run) for run in group], [errors(run) for run in group]
    keys = [key for key in found[0] if all(key in values for values in found)]
    return {
        key: spread(
            [values[key] for values in found],
            [e[key] for e in uncertain] if all(key in e for e in uncertain) else (),
        )
        for key in keys
    }


def _scores(run: RunResults) -> dict[str, float]:
    return run.scores()


def _errors(run: RunResults) -> dict[str, float]:
    return run.beside("standard_errors")


def _metrics(run: RunResults) -> dict[str, float]:
    return _known(run.results["metrics"][run.mode].items())


def _metric_errors(run: RunResults) -> dict[str, float]:
    """The error of the mean over tasks, whose records are independent: √(Σ e²)/T."""
    errors = list(_errors(run).values())
    if len(errors) != len(run.tasks):
        return {}
    error = sum(e**2 for e in errors) ** 0.5 / len(errors)
    return {"ap": error, "last": error}


def _patterns(run: RunResults) -> dict[str, float]:
    """Pattern -> mean of the last row, where all of it was run."""
    patterns = dict.fromkeys([*run.results["patterns"], *(run.results["zero_shot"] or {})])
    rows = {pattern: run.scores(pattern) for pattern in patterns if pattern != RUN_PATTERN}
    return {
        pattern: statistics.fmean(row.values()) for pattern, row in rows.items() if len(row) == len(run.tasks)
    }


def _extras(run: RunResults) -> dict[str, float]:
    results = run.results
    counts = (results["trainable_parameters_per_task"] or {}).values()
    obeyed = run.beside("instruction_following")
    choice = ("task_choice_accuracy", "task_choice_accuracy_without_instruction")
    return _known(
        [
            *((key, results[key]) for key in choice),
            ("parameters_per_task", statistics.fmean(counts) if counts else None),
            ("mif", statistics.fmean(obeyed.values()) if obeyed else None),
        ]
    )


def _known(items: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    return {key: value for key, value in items if value is not None}


def _load(folder: Path, name: str) -> RunResults:
    """One run."""
    results = read_results(folder)
    if results is None:
        raise DeloError(f"There is no {FILE} in this folder.", given=folder, fix="evaluate the run first")
    return RunResults(name, folder, results, settings_of(folder))


def settings_of(folder: Path) -> dict[str, Any]:
    """A run's settings in dotted names, without seeds, places and what the protocol has; empty where no
    config.yaml lies beside or above the results."""
    files = (place / "config.yaml" for place in (folder, folder.parent))
    file = next((file for file in files if file.is_file()), None)
    settings = flat("", read_yaml(file)) if file else {}
    return {
        key: value
        for key, value in settings.items()
        if key not in NOT_SETTINGS and (not key.startswith("eval.") or key == "eval.num_beams")
    }


def _unique(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ends of paths that tell them all apart."""
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]
