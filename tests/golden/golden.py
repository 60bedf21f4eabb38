"""Golden runs: short runs of the whole pipeline whose every number is known, so that a change that should
move code and no number can prove it.

    python tests/golden/golden.py check                 # run them and compare with golden.json
    python tests/golden/golden.py record                # write golden.json anew (a commit of its own, with
    the reason) python tests/golden/golden.py compare REV [REV2]    # two commits on this machine (default:
    the working tree)

Bits hold for one kind of processor and one set of libraries, which golden.json names (`made_on`). Elsewhere
losses are compared within a tolerance and answers by how many are equal; `compare` needs no stored values.
The runs use the command line only, so that any commit can be asked.
"""

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VALUES = HERE / "golden.json"
METHODS = ("delo", "lora", "individual")
#: `--zero` -> ranks.
ENGINES = {"none": 1, "1": 2, "2": 2, "3": 2}
MISSING = {"complete": 0.0, "missing70": 0.7}
#: What decides bits besides the processor.
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "numpy", "pillow", "tokenizers")
#: On another machine: how far a loss may be away, and what share of answers must be equal. Seen between two
#: kinds of one processor's vector units (AVX512 and AVX2): 1.3e-2 in one step of lora, others below 5e-3.
LOSS_TOLERANCE, EQUAL_ANSWERS = 2e-2, 0.9
#: Import name -> folder of the repository, as in pyproject.toml.
PACKAGE_FOLDERS = {
    "delo_llava": "delo_llava", "delo_eval": "eval", "delo_recipes": "data_recipes",
    "delo_ds_configs": "ds_configs",
}  # fmt: skip

Run = dict[str, Any]


def names(engines: Sequence[str] = tuple(ENGINES), methods: Sequence[str] = METHODS) -> list[str]:
    """`<method>-<zero>-<missing>` of the golden runs."""
    return [f"{m}-{z}-{k}" for z in engines for m in methods for k in MISSING]


def words(name: str, output: Path) -> list[str]:
    """The command line of one golden run."""
    method, zero, missing = name.split("-")
    return [
        f"--task_seq={HERE / 'sequence.yaml'}", "--model=mini-llava", "--device=cpu", "--seed=3",
        f"--method={method}", f"--zero={zero}", f"--missing.ratio={MISSING[missing]}",
        f"--output={output / name}",
    ]  # fmt: skip


# ---- running ----
def run_all(code: Path, output: Path, chosen: Sequence[str]) -> dict[str, Run]:
    """Run some golden runs with the code of a checkout, and read what they gave."""
    with tempfile.TemporaryDirectory() as links:
        for package, folder in PACKAGE_FOLDERS.items():
            (Path(links) / package).symlink_to(code / folder)
        for zero, ranks in ENGINES.items():
            if jobs := [words(name, output) for name in chosen if name.split("-")[1] == zero]:
                launch(jobs, Path(links), ranks)
    return {name: read_run(output / name) for name in chosen}


def launch(jobs: list[list[str]], packages: Path, ranks: int) -> None:
    """Train and evaluate the jobs one after the other in one group of `ranks` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(packages)}
    if ranks > 1:
        shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "worker", json.dumps(jobs)],
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.DEVNULL if rank else None,
        )
        for rank in range(ranks)
    ]
    codes = [child.wait(3600) for child in children]
    if any(codes):
        raise SystemExit(f"a golden run failed: exit codes {codes}")


def worker(jobs: list[list[str]]) -> None:
    """One rank: every job in turn, in one process group."""
    from torch import distributed

    from delo_llava.cli import main_train

    # Leaving the group between two jobs would cost another start.
    distributed.destroy_process_group = lambda *_: None
    for job in jobs:
        if main_train(job):
            raise SystemExit(1)


# ---- reading ----
def read_run(folder: Path) -> Run:
    """Losses, hashes of adapters and predictions, and the answers of one finished run."""
    steps = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    predictions = dict(_predictions(folder / "predictions"))
    return {
        "losses": [[step["loss"], step["grad_norm"]] for step in steps],
        "adapters": {
            f"{path.parent.name}/{path.name}": tensors_hash(path)
            for path in sorted((folder / "adapters").glob("*/*.safetensors"))
        },
        "predictions": {cell: digest(json.dumps(rows)) for cell, rows in predictions.items()},
        "answers": {cell: [row[1] for row in rows] for cell, rows in predictions.items()},
    }


def _predictions(folder: Path) -> Iterator[tuple[str, list[list[Any]]]]:
    """(cell, rows of id, answer, answer when told the task, chosen task, scores of the choice)."""
    keys = ("record_id", "prediction", "oracle_prediction", "task_used", "choice_scores")
    for file in sorted(folder.rglob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        yield file.relative_to(folder).as_posix(), [[row.get(key) for key in keys] for row in rows]


def tensors_hash(path: Path) -> str:
    """One hash over names, types, shapes and bits of a safetensors file, whatever its header says besides."""
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def digest(text: str) -> str:
    """The beginning of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- comparing ----
def machine() -> dict[str, str]:
    """What the bits of a run depend on besides this project's code."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(named, platform.machine())
    return {
        "processor": model, "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(), **{name: version(name) for name in PACKAGES},
    }  # fmt: skip


def differences(expected: dict[str, Run], found: dict[str, Run], exact: bool) -> list[str]:
    """One line for everything in which two sets of runs differ."""
    lines = []
    for name, run in found.items():
        lines += [f"{name}: {line}" for line in _differing(expected[name], run, exact)]
    return lines


def _differing(expected: Run, found: Run, exact: bool) -> Iterator[str]:
    if exact:
        yield from (f"step {i}: loss, norm {b}, was {a}" for i, (a, b) in _pairs(expected, found) if a != b)
        for part in ("adapters", "predictions"):
            for key in sorted(expected[part].keys() | found[part].keys()):
                if expected[part].get(key) != found[part].get(key):
                    yield f"{part} {key}: {found[part].get(key)}, was {expected[part].get(key)}"
        return
    if len(expected["losses"]) != len(found["losses"]):
        yield f"{len(found['losses'])} steps, was {len(expected['losses'])}"
    for i, (a, b) in _pairs(expected, found):
        if not abs(a[0] - b[0]) <= LOSS_TOLERANCE * max(1.0, abs(a[0])):
            yield f"step {i}: loss {b[0]}, was {a[0]}"
    if expected["answers"].keys() != found["answers"].keys():
        yield "other cells were evaluated"
    cells = expected["answers"].keys() & found["answers"].keys()
    pairs = [p for c in cells for p in zip(expected["answers"][c], found["answers"][c], strict=True)]
    equal = sum(a == b for a, b in pairs)
    if equal < EQUAL_ANSWERS * len(pairs):
        yield f"{equal} of {len(pairs)} answers are equal"


def _pairs(expected: Run, found: Run) -> Iterator[tuple[int, tuple[list[float], list[float]]]]:
    yield from enumerate(zip(expected["losses"], found["losses"], strict=False))


def known_runs() -> dict[str, Run]:
    """The runs of golden.json."""
    runs: dict[str, Run] = json.loads(VALUES.read_text())["runs"]
    return runs


def check(found: dict[str, Run]) -> list[str]:
    """Differences from golden.json: bit by bit on the machine that made it, within tolerances elsewhere."""
    made_on = json.loads(VALUES.read_text())["made_on"]
    return differences(known_runs(), found, exact=made_on == machine())


def record(found: dict[str, Run]) -> None:
    """Write golden.json; runs that were not made again keep their values if they are of this machine."""
    known = json.loads(VALUES.read_text()) if VALUES.is_file() else {}
    kept = known["runs"] if known.get("made_on") == machine() else {}
    VALUES.write_text(json.dumps({"made_on": machine(), "runs": kept | found}, indent=1) + "\n")


def at_revision(revision: str | None, folder: Path, chosen: Sequence[str]) -> dict[str, Run]:
    """The golden runs of a commit, or of the working tree."""
    if revision is None:
        return run_all(ROOT, folder / "tree", chosen)
    code = folder / f"code-{revision}"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(code), revision], check=True, stdout=subprocess.DEVNULL)
    try:
        return run_all(code, folder / f"runs-{revision}", chosen)
    finally:
        subprocess.run([*git, "remove", "--force", str(code)], check=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("check", "record", "compare"))
    parser.add_argument("revisions", nargs="*", help="for compare: one or two commits")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    chosen = names(given.engines, given.methods)
    with tempfile.TemporaryDirectory() as folder:
        if given.action == "compare":
            first, second = (*given.revisions, None)[:2]
            before, after = (at_revision(r, Path(folder), chosen) for r in (first, second))
            lines = differences(before, after, exact=True)
        else:
            found = run_all(ROOT, Path(folder), chosen)
            if given.action == "record":
                record(found)
            lines = check(found)
    sys.stdout.write("\n".join([*lines, f"{len(lines)} differences in {len(chosen)} runs"]) + "\n")
    return bool(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
