"""What a run's folder holds for its report, read once: results, record, settings, logged steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delo_eval.matrix.accuracy import Cells
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import grids, judged_mode, read_results, result_stage
from delo_llava.errors import DeloError
from delo_llava.runs.store import RunStore
from delo_llava.schema import read_yaml
from delo_llava.strict import parse_json

Json = dict[str, Any]


@dataclass(frozen=True)
class RunContent:
    """A run as its files tell it.

    Attributes:
        store: the run's own folder.
        folder: where its results and predictions are; another folder when another split was evaluated.
        results: results.json; record: run.json; config: config.yaml; steps: the lines of metrics.jsonl.
    """

    store: RunStore
    folder: Path
    results: Json
    record: Json
    config: Json
    steps: list[Json]

    @property
    def tasks(self) -> list[str]:
        """Names in training order."""
        return list(self.results["tasks"])

    @property
    def plan(self) -> Plan:
        """The stages."""
        return Plan.read(self.results)

    @property
    def latest(self) -> int | None:
        """The latest stage with a score under the run's own pattern, None before the first; where no stage is
        planned, the base is the one.
        """
        if not self.plan.stages:
            return result_stage(self.results, self.headline_mode)
        stages = [
            i
            for grid in self.results["matrix"].values()
            for i, row in enumerate(grid)
            if any(score is not None for score in row)
        ]
        return max(stages, default=None)

    @property
    def patterns(self) -> dict[str, dict[str, list[Cells]]]:
        """Missing pattern -> mode -> S×T scores, the run's own first."""
        return grids(self.results)

    @property
    def headline_mode(self) -> str:
        """`matched` where it was run, else `oracle`."""
        return judged_mode(self.results)


def read_content(run: Path, output: Path | None = None) -> RunContent:
    """Read a run's folder.

    Args:
        output: the folder of another evaluation of it, see `delo-eval --output`.

    Raises:
        DeloError: nothing was evaluated there, or a file cannot be read.
    """
    store, folder = RunStore(run), Path(output or run)
    results = read_results(folder)
    if results is None:
        raise DeloError(
            "There are no results to report in this folder.",
            given=folder,
            fix="evaluate a stage first: delo-eval --run …",
        )
    config = read_yaml(store.config) if store.config.is_file() else {}
    return RunContent(store, folder, results, store.read_run(), config, read_steps(store.metrics))


def read_steps(file: Path) -> list[Json]:
    """The logged steps; a last line that a kill cut off is left out.

    Raises:
        DeloError: another line is not JSON.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    steps = []
    for index, line in enumerate(lines):
        try:
            steps.append(_object(parse_json(line)))
        except ValueError as error:
            if index < len(lines) - 1:
                raise DeloError(f"Line {index + 1} of the log is damaged: {error}", given=file) from error
    return steps


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def value_at(tree: Mapping[str, Any] | None, *path: str | int) -> Any:
    """What lies at `path` of nested mappings and lists, None where anything on the way is missing."""
    found: Any = tree
    for key in path:
        if isinstance(found, list) and isinstance(key, int):
            found = found[key] if key < len(found) else None
        elif isinstance(found, Mapping):
            found = found.get(key)
        else:
            return None
    return found
