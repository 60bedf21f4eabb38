"""Write report.html of a run anew: one page, no network, readable on a phone and in print."""

import argparse

from delo_llava.commands.base import Command, say
from delo_llava.files import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and which evaluation of it."""
    parser.add_argument(
        "--run", "--run_dir", dest="run", type=user_path, required=True, help="folder of the run"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        help="folder of another evaluation of it (delo-eval --output); default: the run's own",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    from delo_eval.report.render import write_report

    file = write_report(options.run, options.output)
    say(f"{file} ({file.stat().st_size / 1e6:.2f} MB)\n")
    return 0


COMMAND = Command(arguments, run)
