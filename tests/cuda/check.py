"""Every method, and every engine, on a real GPU: does it run, and does it learn what a CPU learns?

    python tests/cuda/check.py --output DIR                        # all rows, on the one GPU of this machine
    python tests/cuda/check.py --output DIR --rows delo prism-fp32 --jobs 1

The rows are the golden runs' short sequence (three tasks of mini6, four steps each) in different words.
Some exist twice, in fp32 on the GPU and on the CPU (`<method>-fp32`, `<method>-cpu`), and are compared: the
largest relative difference of a loss, and how many answers are equal. DIR/<row>/ is the run, DIR/check.json
all that was found, DIR/worker<i>.log what was said. Exit 1 if a row failed or is too far from its CPU row.

No pytest: a GPU is lent by the minute, so rows share it, and processes take one row after the other.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: In fp32 the two devices add in another order; hard choices at near ties make some steps differ more.
LOSS_TOLERANCE, EQUAL_ANSWERS = 2e-2, 0.9
#: Dropout draws otherwise on another device.
FP32 = ["--dtype=float32", "--missing.ratio=0.7", "--lora.dropout=0"]
ENGINES = {
    "zero1": ["--zero=1"],
    "zero3": ["--zero=3"],
    "offload": ["--zero=2_offload"],
    "one_process": ["--zero=none"],
    "16bit": ["--quant=none"],
    "eager": ["--attn=eager"],
    "checkpointing": ["--train.gradient_checkpointing=true"],
    "qwen": ["--model=mini-qwen"],
}


def golden() -> ModuleType:
    """The golden runs' module: how a run is read."""
    spec = importlib.util.spec_from_file_location("golden", ROOT / "tests" / "golden" / "golden.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> dict[str, list[str]]:
    """Name -> words of every row."""
    from delo_llava.registry import plugin_names

    found = {}
    for method in plugin_names("method"):
        own = [f"--method={method}"]
        found[method] = [*own, "--missing.ratio=0.7"]
        found[f"{method}-fp32"] = [*own, *FP32]
        found[f"{method}-cpu"] = [*own, *FP32, "--device=cpu"]
    for method in ("delo", "lora", "dac"):
        for name, words in ENGINES.items():
            found[f"{method}-{name}"] = [f"--method={method}", "--missing.ratio=0.7", *words]
    return found


def worker(output: Path, number: int, chosen: list[str]) -> None:
    """Run rows one after the other in this process; DIR/worker<i>.json says how each ended."""
    import torch
    from torch import distributed

    from delo_llava.cli import main_train

    distributed.destroy_process_group = lambda *_: None  # leaving the group would cost another start
    found = []
    for name in chosen:
        sys.stdout.write(f"==== {name}\n")
        sys.stdout.flush()
        words = [
            f"--task_seq={ROOT / 'tests' / 'golden' / 'sequence.yaml'}", "--seed=3",
            f"--output={output / name}", *rows()[name],
        ]  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        try:
            code: int | None = main_train(words)
        except (Exception, SystemExit):  # noqa: BLE001 the next row shall run all the same
            traceback.print_exc()
            code = None
        row = {"row": name, "exit": code, "seconds": round(time.monotonic() - began, 1)}
        if torch.cuda.is_available():
            row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        found.append(row)
        (output / f"worker{number}.json").write_text(json.dumps(found))


def run(output: Path, chosen: list[str], jobs: int, limit: float) -> list[dict[str, Any]]:
    """All rows in `jobs` processes; a row without an entry was not reached within `limit` seconds."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    children = []
    # DeepSpeed keeps to one kind of device in a process, so those of the CPU have workers of their own.
    cpu = [name for name in chosen if name.endswith("-cpu")]
    gpu = [name for name in chosen if not name.endswith("-cpu")]
    for_cpu = max(1, jobs * len(cpu) // len(chosen)) if cpu else 0
    shares = [cpu[i::for_cpu] for i in range(for_cpu)]
    shares += [gpu[i :: max(1, jobs - for_cpu)] for i in range(max(1, jobs - for_cpu))]
    for number, share in enumerate(shares):
        command = [sys.executable, __file__, "worker", str(output), str(number), *share]
        log = (output / f"worker{number}.log").open("w")
        children.append(subprocess.Popen(command, env=shared, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + limit
    for child in children:
        try:
            child.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
    return [row for file in sorted(output.glob("worker*.json")) for row in json.loads(file.read_text())]


def compare(output: Path, found: dict[str, dict[str, Any]]) -> None:
    """Enter into each fp32 row how far it is from its CPU row."""
    read = golden().read_run
    for name, row in found.items():
        other = found.get(name.replace("-fp32", "-cpu"))
        if not name.endswith("-fp32") or row["exit"] or other is None or other["exit"]:
            continue
        if not (output / name / "logs" / "metrics.jsonl").is_file():
            continue  # a method without stages has no steps
        here, there = read(output / name), read(output / other["row"])
        pairs = list(zip(here["losses"], there["losses"], strict=True))
        row["loss_difference"] = max((abs(a[0] - b[0]) / max(1.0, abs(b[0])) for a, b in pairs), default=0.0)
        answers = [
            p for c in here["answers"] for p in zip(here["answers"][c], there["answers"][c], strict=True)
        ]
        row["equal_answers"] = sum(a == b for a, b in answers) / len(answers)


def well(row: dict[str, Any]) -> bool:
    """Whether a row ended, and near its CPU row where it has one."""
    near = (
        row.get("loss_difference", 0.0) <= LOSS_TOLERANCE and row.get("equal_answers", 1.0) >= EQUAL_ANSWERS
    )
    return bool(row["exit"] == 0 and near)


def main() -> int:
    """Run the rows, compare, write check.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(rows()), choices=rows(), metavar="ROW")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all of it")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    listed = run(args.output, args.rows, args.jobs, args.limit)
    found = {row["row"]: row for row in listed}
    compare(args.output, found)
    (args.output / "check.json").write_text(json.dumps(listed, indent=1))
    for row in listed:
        sys.stdout.write(" ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    bad = [name for name in args.rows if name not in found or not well(found[name])]
    sys.stdout.write(
        f"{len(args.rows) - len(bad)} of {len(args.rows)} rows are right; not: {' '.join(bad)}\n"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
