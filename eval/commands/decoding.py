"""Measure how long a run's last stage takes to answer, beside the bare base in one process."""

import argparse

from delo_llava.commands.base import Command, at_least, say
from delo_llava.files import user_path, write_json_atomic

FILE = "decoding.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, how often, where to."""
    parser.add_argument(
        "--run", "--run_dir", dest="run", type=user_path, required=True, help="folder of the run"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="times that each task's batch is answered (default: 5)"
    )
    parser.add_argument("--output", type=user_path, help=f"JSON file (default: <run>/{FILE})")


def run(options: argparse.Namespace) -> int:
    """Measure, write the file and say what was found."""
    from delo_eval.harness.decoding_time import measure

    found = measure(options.run, options.rounds)
    file = options.output or options.run / FILE
    write_json_atomic(file, found)
    ratio, control = (
        f"{found[key]['median']:.2f} (quartiles {found[key]['low']:.2f} to {found[key]['high']:.2f})"
        for key in ("ratio", "control")
    )
    say(f"decoding ÷ base: {ratio}; the base ÷ itself, as a control: {control}; {found['pairs']} pairs\n")
    say(f"{file}\n")
    return 0


COMMAND = Command(arguments, run)
