"""Pictures: the matrix as a heatmap, each task's forgetting as a curve, methods as points. Only this imports
matplotlib, on demand.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delo_eval.matrix.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Folder of the plots inside a run.
PLOTS = "plots"
HEATMAP, FORGETTING = "heatmap.png", "forgetting.png"
DPI = 130


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write heatmap.png and, where stages are trained, forgetting.png into `folder`; nothing when no stage
    was evaluated.

    Args:
        results: the content of a results.json.
    """
    if not results["modes"]:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figures = {HEATMAP: heatmap(results)}
    if Plan.read(results).stages:
        figures[FORGETTING] = forgetting_curves(results)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]


def draw_changed(before: Mapping[str, Any] | None, after: Mapping[str, Any], folder: Path) -> None:
    """Draw anew, unless the results before said the same and the plots are there."""

    def said(results: Mapping[str, Any] | None) -> dict[str, Any]:
        return {key: value for key, value in (results or {}).items() if key != "seconds"}

    drawn = (HEATMAP, FORGETTING) if Plan.read(after).stages else (HEATMAP,)
    there = all((folder / name).is_file() for name in drawn)
    if not there or said(before) != said(after):
        draw(after, folder)


def heatmap(results: Mapping[str, Any]) -> "Figure":
    """One panel per mode: stage × task in percent, zero-shot on top; cells that were not run stay white."""
    from matplotlib.figure import Figure

    modes, tasks, stages = results["modes"], results["tasks"], Plan.read(results).names
    zero_shot = (results["zero_shot"] or {}).get("run")
    side = 1.6 + 0.72 * len(tasks)
    figure = Figure(figsize=(side * len(modes) + 0.8, side), layout="constrained")
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    for axis, mode in zip(axes, modes, strict=True):
        grid = np.array(([zero_shot] if zero_shot else []) + results["matrix"][mode], dtype=np.float64)
        image = _grid(axis, grid, tasks, (["zero-shot"] if zero_shot else []) + stages)
        axis.set_title(f"{results['method']}: {mode}{_metric_note(results, mode)}", fontsize=10)
    figure.colorbar(image, ax=list(axes), label="score (%)", shrink=0.85)
    return figure


def forgetting_curves(results: Mapping[str, Any]) -> "Figure":
    """One panel per mode: each task's score from its own stage on, and the mean over tasks seen so far."""
    from matplotlib.figure import Figure

    modes, plan = results["modes"], Plan.read(results)
    figure = Figure(figsize=(5.2 * len(modes) + 1.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axis, mode in zip(axes, modes, strict=True):
        _curves(axis, np.array(results["matrix"][mode], dtype=np.float64), plan)
        axis.set_title(f"{results['method']}: {mode}{_metric_note(results, mode)}", fontsize=10)
    axes[0].set_ylabel("score (%)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


#: A point of `points`: (x, deviation of x or None), (y, deviation of y or None).
Point = tuple[tuple[float, float | None], tuple[float, float | None]]


def points(places: Mapping[str, Point], x_label: str, y_label: str) -> "Figure":
    """A labelled point with its deviations for every name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    for name, ((x, x_error), (y, y_error)) in places.items():
        axis.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", capsize=2)
        axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    return figure


def _grid(
    axis: "Axes", grid: "np.ndarray[Any, np.dtype[np.float64]]", columns: Sequence[str], rows: Sequence[str]
) -> Any:
    """A heatmap with its numbers written into the cells."""
    image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=max(100.0, float(np.nanmax(grid))), aspect="auto")
    for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        axis.text(
            j,
            i,
            f"{grid[i, j]:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if grid[i, j] < 55 else "black",
        )
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xlabel("evaluated on")
    axis.set_ylabel("after training")
    return image


def _curves(axis: "Axes", grid: "np.ndarray[Any, np.dtype[np.float64]]", plan: Plan) -> None:
    """Lines from each task's own stage to the last; tasks trained last are one point."""
    stages, column = np.arange(len(plan.stages)), {task: j for j, task in enumerate(plan.tasks)}
    for task, j in column.items():
        own = plan.own(task)
        if own is not None:
            axis.plot(
                stages[own:], grid[own:, j], marker="o", markersize=3.5, linewidth=1.3, label=task,
                color=f"C{j % 10}",
            )  # fmt: skip
    means = [grid[i, [column[task] for task in plan.seen(i)]].mean() for i in stages.tolist()]
    axis.plot(stages, means, color="black", linestyle="--", linewidth=1.6, label="mean of seen tasks")
    axis.set_xticks(stages, plan.names, rotation=40, ha="right", fontsize=8)
    axis.set_xlabel("after training")
    axis.set_ylim(0, max(102.0, float(np.nanmax(grid)) * 1.02))
    axis.grid(alpha=0.25)


def _metric_note(results: Mapping[str, Any], mode: str) -> str:
    """AP and forgetting for a title, as far as they are defined."""
    found = results["metrics"][mode]
    shown = [(label, found.get(name)) for label, name in (("AP", "ap"), ("forgetting", "forgetting"))]
    return "".join(f", {label} {value:.1f}" for label, value in shown if value is not None)
