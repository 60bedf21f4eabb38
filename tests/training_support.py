"""A tiny sequence on disk and a process that trains it, for tests that launch the real pipeline.

As a program, `python training_support.py JOBS.json` runs each job's `run_sequence` in turn, in one process
group if RANK is set.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (220, 210, 30)}


def write_sequence(folder: Path, tasks: int = 2, records: int = 16) -> Path:
    """A recipe whose tasks ask for colours that pictures and captions show; returns the YAML file."""
    from PIL import Image

    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(images / f"{name}.png")
    entries = []
    for task in range(tasks):
        for split, count in (("train", records), ("test", 4)):
            rows = [_record(task, split, number) for number in range(count)]
            (folder / f"task{task}_{split}.json").write_text(json.dumps(rows))
        files = {split: f"task{task}_{split}.json" for split in ("train", "test")}
        entries.append({"name": f"task{task}", "kind": "colour", "files": files})
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps({"name": "tiny", "tasks": entries}))  # JSON is YAML
    return recipe


def _record(task: int, split: str, number: int) -> dict[str, Any]:
    colour = list(COLOURS)[(number + task) % len(COLOURS)]
    words = "shown here " * (1 + number % 3)
    return {
        "id": f"{split}-{number}",
        "image": f"images/{colour}.png",
        "context": f"the picture is {colour} {words}",
        "conversations": [
            {"from": "human", "value": f"<image>\nwhat color is it, question {task}"},
            {"from": "gpt", "value": f"{colour} {task}"},
        ],
    }


def words(recipe: Path, model: Path, output: Path, *more: str) -> list[str]:
    """A command line for a tiny run of `lora` in the one-process engine; `more` overrides it."""
    return [
        f"--task_seq={recipe}",
        f"--data.root={recipe.parent}",
        f"--model={model}",
        f"--output={output}",
        "--method=lora",
        "--lora.rank=2",
        "--zero=none",
        "--quant=none",
        "--device=cpu",
        "--missing.ratio=0.4",
        "--train.global_batch=8",
        "--train.micro_batch=2",
        "--train.epochs=2",
        "--train.lr=0.01",
        "--train.projector_lr=0.002",
        "--train.log_every=1",
        "--train.warmup=0.3",
        *more,
    ]


def metrics(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]


def bits(output: Path) -> dict[str, str]:
    """sha256 of every published file, by task and name."""
    manifests = sorted((output / "adapters").glob("*/manifest.json"))
    return {
        f"{path.parent.name}/{name}": entry["sha256"]
        for path in manifests
        for name, entry in json.loads(path.read_text())["files"].items()
    }


def launch(jobs: list[dict[str, Any]], folder: Path, ranks: int = 1, timeout: float = 1200.0) -> list[int]:
    """Run jobs in `ranks` processes and return their exit codes; a job is {"words": [...], "kill": {...}}."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    port = free_port()
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    group = (
        {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
    )
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(file)],
            env=here | group | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
        )
        for rank in range(ranks)
    ]
    try:
        return [child.wait(timeout) for child in children]
    finally:
        for child in children:
            child.kill()


def free_port() -> int:
    """A port of this machine that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Interrupted(Exception):
    """Raised by a job's evaluation to end a run between two stages without ending the process."""


def ask_to_leave(stage: int, step: int, rank: int = 0) -> None:
    """Send this process a signal, if it is `rank`, at the end of one step."""
    from delo_llava.engines import signals
    from delo_llava.runs import observer

    done = observer.StageObserver.step
    signals.install()

    def asked(self: observer.StageObserver, report: Any) -> None:
        done(self, report)
        if (self.stage.index, report.step, self.ranks.rank) == (stage, step, rank):
            os.kill(os.getpid(), signal.SIGUSR1)

    observer.StageObserver.step = asked  # type: ignore[method-assign]


def sabotage(
    poison: str | None = None,
    rows: int | None = None,
    rank: int | None = None,
    fail: str | None = None,
    hang: str | None = None,
) -> Callable[[], None]:
    """Make forward passes fail; returns what undoes it.

    Args:
        poison: a record (`task/id`) whose loss is not a number.
        rows: more of them than this do not fit into the memory, of `rank` if that is given.
        fail: a record with which a forward pass raises an exception.
        hang: a record with which a forward pass does not come back.
    """
    from delo_llava.engines.module import MethodModule

    forward = MethodModule.forward

    def failing(self: MethodModule, batch: Any) -> Any:
        if rows is not None and len(batch) > rows and rank in (None, int(os.environ.get("RANK", "0"))):
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate a lot")
        names = [f"{task}/{name}" for task, name in zip(batch.tasks, batch.record_ids, strict=True)]
        if fail in names:
            raise ValueError("something broke")
        while hang in names:
            time.sleep(1)
        sums = forward(self, batch)
        return {key: value * float("nan") for key, value in sums.items()} if poison in names else sums

    MethodModule.forward = failing  # type: ignore[method-assign]

    def undo() -> None:
        MethodModule.forward = forward  # type: ignore[method-assign]

    return undo


def run_job(job: dict[str, Any]) -> None:
    """Train one sequence; `kill` says where this process kills itself, `stop` after which stage it leaves,
    `ask` at which step which rank gets a signal, `sabotage` how forward passes fail; `error` names the file
    for the text of a DeloError."""
    from delo_llava.cli import resolve
    from delo_llava.engines import signals
    from delo_llava.errors import DeloError
    from delo_llava.runs import observer
    from delo_llava.runs import sequence as stages
    from delo_llava.runs.job import make_job
    from delo_llava.training import logging

    step = observer.StageObserver.step
    kill, stop, ask = job.get("kill"), job.get("stop"), job.get("ask")
    if ask is not None:
        ask_to_leave(**ask)
    undo = sabotage(**job.get("sabotage", {}))
    if kill is not None:
        write = logging.MetricsLog.write

        def deadly(self: logging.MetricsLog, entry: Any) -> None:
            write(self, entry)
            if (entry["stage"], entry["step"]) == (kill["stage"], kill["step"]):
                os.kill(os.getpid(), signal.SIGKILL)

        logging.MetricsLog.write = deadly  # type: ignore[method-assign]

    def evaluate(run: Path, stage: int) -> None:
        if stage == stop:
            raise Interrupted
        with (run / "evaluated.txt").open("a") as file:
            file.write(f"{stage}\n")

    try:
        second = job.get("second") if os.environ.get("RANK") == "1" else None
        os.environ |= job.get("second_env", {}) if os.environ.get("RANK") == "1" else {}
        stages.run_sequence(make_job(resolve(second or job["words"])), evaluate)
    except Interrupted:
        return
    except signals.Preempted as asked:
        if not asked.together:
            raise  # the others wait for this rank in vain: only the launcher can end them
    except DeloError as error:
        if "error" not in job:
            raise
        Path(f"{job['error']}{os.environ.get('RANK', '0')}").write_text(str(error))
    finally:
        undo()
        signals.clear()
        observer.StageObserver.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    from delo_llava.engines import ranks

    ranks.stop_ranks = lambda _: None  # type: ignore[assignment]  # the jobs share one process group
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_job(entry)
