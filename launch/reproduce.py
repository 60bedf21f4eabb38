"""Reproduce the README's table: every method, seed and missing setting through `launch/train.py`, then mean ±
std.

    python launch/reproduce.py                      # all of it; about 18 runs
    python launch/reproduce.py --methods delo lora --seeds 0
    python launch/reproduce.py --table-only         # only read what is finished

Every run is an ordinary run directory; killed at any point, the same command goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from delo_eval.compare.seeds import summarise_seeds
from delo_llava.endings import told
from delo_llava.files import user_path

SETTINGS = {
    "missing70": ["--missing.ratio=0.7", "--missing.kind=both"],
    "complete": ["--missing.ratio=0"],
}


def main() -> int:
    """Run what is not finished, then write table.md and table.json."""
    args, extra = _arguments()
    for setting in args.settings:
        for seed in args.seeds:
            for method in args.methods:
                if not args.table_only and (code := _run(args, setting, method, seed, extra)):
                    return code
    sys.stdout.write(summarise_seeds(args.output, args.settings, args.methods) + "\n")
    return 0


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=user_path, default=Path("runs/table"))
    parser.add_argument("--task_seq", default="mini6")
    parser.add_argument("--methods", nargs="+", default=["delo", "lora", "individual"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--table-only", action="store_true")
    return parser.parse_known_args()


def _run(args: argparse.Namespace, setting: str, method: str, seed: int, extra: list[str]) -> int:
    output = args.output / setting / f"{method}-s{seed}"
    launcher = Path(sys.executable).with_name("deepspeed")
    train = Path(__file__).with_name("train.py")
    command = [
        str(launcher), "--num_gpus", str(args.ranks), str(train), "--task_seq", args.task_seq, "--method",
        method,
        "--seed", str(seed), f"--missing.seed={seed}", "--output", str(output), *SETTINGS[setting], *extra,
    ]  # fmt: skip
    sys.stdout.write(f"{setting} {method} seed {seed} -> {output}\n")
    sys.stdout.flush()
    code = subprocess.run(command, check=False).returncode
    if code == 0 and not (output / "results.json").is_file():
        sys.stderr.write(f"error: {output} has no results.json although the launcher reported success\n")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(told(main, goes_on=True))
