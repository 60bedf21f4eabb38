"""What a run tells: JSON lines of metrics, TensorBoard when asked for, one bar for the whole sequence."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from delo_llava.errors import printable
from delo_llava.extras import require_extra
from delo_llava.files import write_text_atomic

#: Without a terminal, a line of progress is written this often (seconds).
QUIET = 15.0


class MetricsLog:
    """`logs/metrics.jsonl`: one JSON object per logged step; mirrored to TensorBoard if asked for.

    Args:
        path: the JSONL file.
        stage, step: lines from this step of this stage on are dropped: there an interrupted stage goes on.
        tensorboard: also write event files beside it, a folder for each stage.

    Raises:
        DeloError: TensorBoard asked for and not installed.
    """

    def __init__(self, path: Path, stage: int, step: int = 0, tensorboard: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        write_text_atomic(path, "".join(line for line in lines if _place_of(line) < (stage, step)))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        folder = path.parent / "tensorboard" / f"stage{stage}"
        self._writer = _summary_writer(folder, step) if tensorboard else None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one entry; it must hold `stage`, `task` and `step`."""
        self._file.write(json.dumps(entry) + "\n")
        if self._writer is not None:
            for name, value in _scalars(entry):
                self._writer.add_scalar(f"{entry['task']}/{name}", value, entry["step"])

    def flush(self) -> None:
        """Bring what was written to the disk, before a checkpoint that relies on it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class Eta:
    """Time left of a sequence: steps and evaluations are timed apart, since their numbers grow differently.

    Args:
        steps: training steps still to do.
        cells: (stage, task) evaluations still to do.
    """

    def __init__(self, steps: int, cells: int) -> None:
        self.steps, self.cells = steps, cells
        self._spent = {"step": [0.0, 0], "cell": [0.0, 0]}

    def trained(self, seconds: float) -> None:
        """One step was done."""
        self._spent["step"][0] += seconds
        self._spent["step"][1] += 1
        self.steps -= 1

    def evaluated(self, seconds: float, cells: int) -> None:
        """Some evaluations were done."""
        self._spent["cell"][0] += seconds
        self._spent["cell"][1] += cells
        self.cells -= cells

    def seconds(self) -> float | None:
        """Expected seconds left; None before the first step. Unseen evaluations are left out."""
        if not self._spent["step"][1]:
            return None
        left = {"step": self.steps, "cell": self.cells}
        return sum(left[kind] * spent / count for kind, (spent, count) in self._spent.items() if count)


class RunProgress:
    """One bar with one ETA for the whole sequence; plain lines now and then where there is no terminal.

    Args:
        steps, cells: what is left of the sequence, see `Eta`.
        before: steps of the stages that earlier launches finished.
        shown: only the first rank shows anything.
    """

    def __init__(self, steps: int, cells: int, before: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.eta = Eta(steps, cells)
        self._live = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            _EtaColumn(self.eta),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
            refresh_per_second=2,
        )
        self._bar = self._live.add_task("starting", total=max(1, before + steps), completed=before, loss="")
        self._said, self._total = time.monotonic(), before + steps

    def __enter__(self) -> "RunProgress":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def describe(self, text: str) -> None:
        """What is being done now."""
        self._live.update(self._bar, description=text)
        self._text = text

    def step(self, seconds: float, loss: float) -> None:
        """One step was done."""
        self.eta.trained(seconds)
        self._live.update(self._bar, advance=1, loss=f"loss {loss:.4f}")
        if not self.console.is_terminal and time.monotonic() - self._said > QUIET:
            self._said = time.monotonic()
            done = self._total - self.eta.steps
            left = clock(self.eta.seconds())
            self.say(f"{self._text}: step {done}/{self._total} of the sequence, loss {loss:.4f}, ETA {left}")

    def resumed(self, steps: int) -> None:
        """So many steps of the stage were done by an earlier launch."""
        self.eta.steps -= steps
        self._live.update(self._bar, advance=steps)

    def evaluated(self, seconds: float, cells: int) -> None:
        """Some evaluations were done."""
        self.eta.evaluated(seconds, cells)


class _EtaColumn(ProgressColumn):
    """The sequence's ETA."""

    def __init__(self, eta: Eta) -> None:
        super().__init__()
        self.eta = eta

    def render(self, task: Task) -> Text:
        """`ETA 0:03:20`, evaluations included."""
        return Text(f"ETA {clock(self.eta.seconds())}")


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def matrix_row(results: Mapping[str, Any], stage: int, name: str) -> str:
    """The row of stage `stage`, called `name`, in percent: a line per way of choosing the task that was
    run.
    """
    tasks, lines = results["tasks"], []
    for mode, rows in _told(results["matrix"]).items():
        if rows and rows[stage] and any(score is not None for score in rows[stage]):
            scores = [
                f"{name} {score:.1f}"
                for name, score in zip(tasks, rows[stage], strict=True)
                if score is not None
            ]
            lines.append(f"after {stage + 1}. {name} ({mode}): {' · '.join(scores)}")
    return "\n".join(lines)


def matrix_summary(results: Mapping[str, Any], stages: Sequence[str]) -> str:
    """The whole matrix and its metrics, one block per way of choosing the task; without `stages` (their
    names) the base's row.
    """
    tasks, grids = results["tasks"], results["matrix"]
    if not stages:
        stages, grids = ["base"], {"matched": [(results["zero_shot"] or {}).get("run")]}
    width = max(8, *map(len, [*tasks, *stages])) + 1
    blocks = []
    for mode, rows in _told(grids).items():
        if not rows or not any(score is not None for row in rows for score in row or []):
            continue
        lines = [f"{mode}:", " " * width + "".join(f"{name:>{width}}" for name in tasks)]
        for name, row in zip(stages, rows, strict=True):
            cells = ["" if score is None else f"{score:.1f}" for score in row or []]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>{width}}" for cell in cells))
        metrics = results["metrics"].get(mode.partition(" ")[0]) or {}
        shown = [
            f"{key} {metrics[key]:.2f}" for key in ("ap", "forgetting", "maa") if metrics.get(key) is not None
        ]
        blocks.append("\n".join([*lines, " · ".join(shown)]))
    if general := results.get("general"):
        known = ("–" if general[key] is None else f"{general[key]:.1f}" for key in ("base", "last"))
        blocks.append(f"general ability, base → last stage: {' → '.join(known)}")
    return "\n\n".join(blocks)


def _told(grids: Mapping[str, Any]) -> dict[str, Any]:
    """The grids by mode; once where both modes have the same scores."""
    if "oracle" in grids and grids["matched"] == grids["oracle"]:
        return {"matched = oracle": grids["matched"]}
    return dict(grids)


def _place_of(line: str) -> tuple[int, int]:
    """Stage and step of a metrics line; a line that was cut off by a kill counts as the latest."""
    try:
        entry = json.loads(line)
        return int(entry["stage"]), int(entry["step"])
    except (ValueError, KeyError, TypeError):
        return 10**9, 0


def _scalars(entry: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for key, value in entry.items():
        if isinstance(value, Mapping):
            pairs += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("stage", "step", "time"):
            pairs.append((prefix + key, float(value)))
    return pairs


def _summary_writer(folder: Path, step: int) -> Any:
    require_extra("track", "train.tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step)
