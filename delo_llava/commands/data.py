"""Look after data: check files, entries, images and counts of a sequence."""

import argparse
from pathlib import Path

from delo_llava.commands import _fixture
from delo_llava.commands.base import Command, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command each."""
    commands = parser.add_subparsers(required=True, metavar="command")
    check = commands.add_parser("check", help="check files, entries, images and counts of a sequence")
    check.add_argument("recipe", help="a recipe's name or file")
    check.add_argument("--root", type=Path, help="data root (default: $DELO_LLAVA_DATA, else data/<name>)")
    check.set_defaults(data=_check)
    _fixture.arguments(commands.add_parser("fixture", help="write a small set in a recipe's exact layout"))


def run(options: argparse.Namespace) -> int:
    """Hand over to the sub-command."""
    code: int = options.data(options)
    return code


def _check(options: argparse.Namespace) -> int:
    """Check a sequence's data; 1 when something is wrong with it."""
    from delo_llava.data.check import check_sequence
    from delo_llava.data.recipe import load_sequence

    faults = 0
    for report in check_sequence(load_sequence(options.recipe, options.root)):
        say(f"{report}\n")
        faults += len(report.faults)
    say(f"{faults} faults\n" if faults else "all files, entries and images are there\n")
    return 1 if faults else 0


COMMAND = Command(arguments, run)
