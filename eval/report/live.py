"""The page of `delo-llava watch`: how far a run is, its curves and scores so far, from its files alone."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delo_eval.matrix.results import read_results
from delo_eval.report.content import RunContent, read_steps
from delo_eval.report.learning import learning
from delo_eval.report.matrices import forgetting, missing_words
from delo_eval.report.render import FAULTS, render
from delo_llava.errors import DeloError
from delo_llava.runs.store import RunStore
from delo_llava.schema import read_yaml

#: Seconds without a logged step after which the page says so: an evaluation logs none.
SILENT = 60.0
#: What of the last step is shown: title -> path in its line.
LAST = {
    "loss": ("loss",),
    "learning rate": ("lr", "language"),
    "gradient norm": ("grad_norm",),
    "seconds a step": ("seconds",),
    "samples a second": ("samples_per_second",),
}


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        share: of all training steps, 0 … 1.
        left: seconds of training and evaluating that are left, at the speed so far; None before it is known.
        state: what it does, as far as files tell.
    """

    share: float
    left: float | None
    state: str


def live_page(run: Path, every: int, now: float | None = None) -> str:
    """The page as it is now; it asks for itself again after `every` seconds until the run is finished.

    Raises:
        DeloError: there is no run in this folder.
    """
    store = RunStore(run)
    if not store.run.is_file():
        raise DeloError("There is no run in this folder yet.", given=run, fix="start it, or name another one")
    content = _content(store)
    progress = progress_of(content, store.complete.is_file(), time.time() if now is None else now)
    spec = content.config.get("missing")
    return render(
        "live.html.j2",
        {
            "name": run.resolve().name,
            "method": content.config.get("method", ""),
            "sequence": Path(str(content.config.get("task_seq", ""))).stem,
            "missing": missing_words(spec) if spec else "",
            "progress": progress,
            "percent": f"{100 * progress.share:.0f}",
            "left": duration(progress.left) if progress.left is not None else "",
            "every": None if store.complete.is_file() else every,
            "last": _last(content.steps[-1]) if content.steps else [],
            "learning": learning(content),
            "forgetting": _evaluated(content),
            "notes": content.record.get("notes", []),
            "sections": [("now", "Now"), ("learning", "Learning"), ("scores", "Scores")],
        },
    )


def _content(store: RunStore) -> RunContent:
    """The run as far as it is; before the first evaluation there are no results."""
    record = store.read_run()
    results: Mapping[str, Any] = read_results(store.root) or {
        "tasks": record["tasks"],
        "plan": record["plan"],
    }
    config = read_yaml(store.config) if store.config.is_file() else {}
    return RunContent(store, store.root, dict(results), record, config, read_steps(store.metrics))


def progress_of(content: RunContent, complete: bool, now: float) -> Progress:
    """How far the run is, by the epochs that its steps were logged at.

    Args:
        complete: whether it reached its end.
    """
    stages, steps = content.plan.stages, content.steps
    if complete:
        return Progress(1.0, 0.0, "finished")
    if not stages or not steps:
        return Progress(0.0, None, "starting: no step was logged yet")
    last = steps[-1]
    index = min(int(last["stage"]), len(stages) - 1)
    epochs = float((content.config.get("train") or {}).get("epochs") or 1.0)
    share = (index + min(1.0, float(last.get("epoch", 0.0)) / epochs)) / len(stages)
    spent = sum(_pauses(steps))
    left = spent * (1 - share) / share if share and spent else None
    stopped = content.record.get("stopped")
    silent = now - float(last.get("time", now))
    if stopped:
        state = f"left by {stopped['reason']} while {stopped['where']}; the same command goes on"
    elif silent > SILENT:
        state = f"no step for {duration(silent)}: it evaluates, or it does not run"
    else:
        state = f"training {content.plan.label(index)}"
    return Progress(share, left, state)


def _pauses(steps: list[dict[str, Any]]) -> list[float]:
    """Seconds between logged steps, without those between two launches (longer than an hour)."""
    times = [float(step["time"]) for step in steps if "time" in step]
    return [b - a for a, b in zip(times, times[1:], strict=False) if 0 <= b - a < 3600]


def _last(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(f"step of {step['task']}", f"{step['step'] + 1:,}")]
    for title, path in LAST.items():
        value: Any = step
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append((title, f"{value:.4g}"))
    return found


def _evaluated(content: RunContent) -> list[Any]:
    """Curves of what was evaluated; none before, and none while a file is being written anew."""
    if "matrix" not in content.results:
        return []
    try:
        return list(forgetting(content))
    except FAULTS:
        return []


def duration(seconds: float) -> str:
    """`3 h 05 min`, `4 min`, `20 s`."""
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
