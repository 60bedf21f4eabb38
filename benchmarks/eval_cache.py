"""What an evaluation costs the second time, in batches, and for several stages in one process: ratios.

    python benchmarks/eval_cache.py                    # trains a few steps of mini6 on mini-llava first
    python benchmarks/eval_cache.py --run runs/x       # a run that is there; nothing in it is changed

Prints a table to stderr and JSON to stdout. Times are CPU seconds of whole processes (start, imports and
all), but for the batches, which are compared in one process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delo_eval.harness.folder import Request
from delo_eval.harness.questions import Questions, cells_of
from delo_llava.files import user_path

TARGETS = {
    "second evaluation / first": 0.02,
    "all stages in one process / a process each": 0.5,
    "one by one / batched": 5.0,
}


def train(folder: Path, steps: int) -> None:
    """A run of mini6 with `steps` optimiser steps a task, not evaluated."""
    from delo_llava.cli import resolve
    from delo_llava.runs.job import make_job
    from delo_llava.runs.sequence import run_sequence

    words = ["--task_seq=mini6", "--zero=none", f"--output={folder}", f"--train.max_steps={steps}"]
    run_sequence(make_job(resolve([*words, "--missing.ratio=0.7"])))


def process(*words: object) -> float:
    """CPU seconds of one `delo-eval`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from delo_eval.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def second_time(run: Path, output: Path) -> dict[str, float]:
    """The last stage for the first time, again, and again with the scores to be computed anew."""
    words = ("--run", run, "--stage", "last", "--output", output)
    first = process(*words)
    second = statistics.median(process(*words) for _ in range(3))
    content = json.loads((output / "results.json").read_text())
    stage = max(content["seconds"]["answers"])
    assert content["seconds"]["answers"][stage]["new"] == 0
    (output / "answers" / f"{stage}.json").unlink()
    scored = process(*words)
    return {
        "first": first, "second": second, "scored again": scored,
        "second evaluation / first": second / first, "scored again / first": scored / first,
    }  # fmt: skip


def stages(run: Path, output: Path, limit: int) -> dict[str, float]:
    """All stages in one process, and in one process each."""
    words = ("--run", run, "--limit", limit, "--patterns", "run", "--no-cache")
    together = process(*words, "--stage", "all", "--output", output / "together")
    count = len(list((run / "adapters").iterdir()))
    each = sum(process(*words, "--stage", i, "--output", output / "each") for i in range(count))
    return {
        "one process": together, f"{count} processes": each,
        "all stages in one process / a process each": together / each,
    }  # fmt: skip


def batched(run: Path, count: int) -> dict[str, float]:
    """Questions decoded in length-sorted batches and one by one, in interleaved rounds in this process."""
    import torch

    from delo_eval.harness.generate import batches
    from delo_eval.harness.model import answerer, open_run
    from delo_eval.harness.ranks import current_ranks

    torch.set_num_threads(1)
    opened = open_run(run, Request(limit=count))
    stage = len(list((run / "adapters").iterdir())) - 1
    cells = cells_of(opened.sequence, opened.plan, stage, ["run"], needs_task=False)
    questions = [(cell, Questions(opened.config).of(cell)) for cell in cells]
    times: dict[int, list[float]] = {1: [], opened.config.eval.batch_size: []}
    said: dict[int, list[str]] = {}
    with answerer(opened, stage, current_ranks(opened.config).device) as ready:

        def timed(size: int) -> Callable[[], None]:
            def run_all() -> None:
                found = [
                    (q.record.task, q.record.id, a.prediction)
                    for cell, asked in questions
                    for batch in batches(asked, size)
                    for q, a in zip(batch, ready.answer(batch, cell.task.max_new_tokens), strict=True)
                ]
                said[size] = [text for _, _, text in sorted(found)]

            return run_all

        for _ in range(3):
            for size, spent in times.items():
                began = time.process_time()
                timed(size)()
                spent.append(time.process_time() - began)
    one, many = (statistics.median(times[size]) for size in times)
    same = len(set(map(tuple, said.values()))) == 1
    return {
        "one by one": one, f"batches of {opened.config.eval.batch_size}": many, "same answers": float(same),
        "one by one / batched": one / many,
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=user_path, help="folder of a finished run; by default one is trained")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a task of that training")
    parser.add_argument("--limit", type=int, default=20, help="questions a task where stages are compared")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or Path(scratch) / "run"
        if arguments.run is None:
            train(run, arguments.steps)
        found: dict[str, Any] = {
            **second_time(run, Path(scratch) / "cache"),
            **stages(run, Path(scratch) / "stages", arguments.limit),
            **batched(run, arguments.limit),
        }
    for name, value in found.items():
        target = f"   target {TARGETS[name]}" if name in TARGETS else ""
        sys.stderr.write(f"{name:45} {value:10.4f}{target}\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
