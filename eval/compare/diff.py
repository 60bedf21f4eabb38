"""What two runs do not have in common: configuration, conditions, versions, adapters' hashes, scores."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from delo_eval.compare.protocol import Difference, differences, flat
from delo_eval.compare.runs import RunResults, load_runs
from delo_eval.matrix.accuracy import MODES, Cells, Mode
from delo_eval.tables import rich_table
from delo_llava.runs.store import RunStore
from delo_llava.schema import read_yaml


@dataclass(frozen=True)
class RunDiff:
    """Two runs, side by side.

    Attributes:
        names: of the two.
        sections: `config`, `conditions`, `versions`, `adapters` -> what differs there.
        tasks, stages: of the first run, in its order.
        matrices: mode -> second − first, in points, on the tasks' common cells; `None` where one has none.
            Empty when the runs have other tasks or stages.
    """

    names: tuple[str, str]
    sections: Mapping[str, tuple[Difference, ...]]
    tasks: tuple[str, ...]
    stages: tuple[str, ...]
    matrices: Mapping[Mode, list[Cells]]

    @property
    def same(self) -> bool:
        """Whether nothing differs at all."""
        cells = [cell for grid in self.matrices.values() for row in grid for cell in row]
        return not any(self.sections.values()) and not any(cells)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON."""
        return {"schema": "delo-llava/diff/1", **asdict(self)}


def diff_runs(first: Path, second: Path) -> RunDiff:
    """Compare two run folders field by field; nothing is refused, as nothing is averaged or ranked.

    Raises:
        DeloError: a folder without results.
    """
    a, b = load_runs([first, second])
    sections = {
        "config": _apart(a, b, _config),
        "conditions": _apart(a, b, lambda run: run.protocol),
        "versions": _apart(a, b, lambda run: flat("", run.results["versions"] or {})),
        "adapters": _apart(a, b, _adapters),
    }
    alike = a.plan == b.plan
    grids = {mode: _minus(a.results["matrix"][mode], b.results["matrix"][mode]) for mode in MODES if alike}
    return RunDiff((a.name, b.name), sections, a.plan.tasks, tuple(a.plan.names), grids)


def shown(diff: RunDiff) -> list[RenderableType]:
    """One table of what differs, then the difference of the matrices."""
    if diff.same:
        return [Text(f"{diff.names[0]} and {diff.names[1]} agree in everything compared")]
    table = Table(title=Text("what differs"), title_justify="left")
    for head in ("where", "what", *diff.names):
        table.add_column(Text(head), overflow="fold")
    for section, found in diff.sections.items():
        for d in found:
            table.add_row(section, d.field, *(Text(str(value)) for value in d.values.values()))
    parts: list[RenderableType] = [table] if table.row_count else []
    for mode, grid in diff.matrices.items():
        if any(cell is not None for row in grid for cell in row):
            parts.append(_matrix(diff, mode, grid))
    return parts


def _matrix(diff: RunDiff, mode: str, grid: list[Cells]) -> Table:
    title = f"{mode}: {diff.names[1]} − {diff.names[0]}, points on (column) after training (row)"
    table = rich_table(Text(title), [Text(head) for head in ("", *diff.tasks)])
    for stage, row in zip(diff.stages, grid, strict=True):
        table.add_row(stage, *("-" if cell is None else f"{cell:+.2f}" for cell in row))
    return table


def _apart(
    a: RunResults, b: RunResults, of: Callable[[RunResults], dict[str, Any]]
) -> tuple[Difference, ...]:
    return tuple(differences({a.name: of(a), b.name: of(b)}))


def _config(run: RunResults) -> dict[str, Any]:
    file = RunStore(run.folder).config
    return flat("", read_yaml(file)) if file.is_file() else {}


def _adapters(run: RunResults) -> dict[str, Any]:
    """Task -> sha256 of the manifest of its adapter."""
    stages = RunStore(run.folder).read_run().get("stages", {})
    return {task: entry.get("manifest") for task, entry in stages.items()}


def _minus(first: list[Cells], second: list[Cells]) -> list[Cells]:
    return [
        [None if x is None or y is None else y - x for x, y in zip(one, other, strict=True)]
        for one, other in zip(first, second, strict=True)
    ]
