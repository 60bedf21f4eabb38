"""Look at this machine: versions, device, 4 bit, DeepSpeed, launcher, disk, limits, network."""

import argparse
from pathlib import Path

from delo_llava.commands.base import Command
from delo_llava.files import user_path

STYLE = {"ok": "green", "warning": "yellow", "error": "bold red"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Where to look."""
    parser.add_argument("--folder", type=user_path, default=Path("runs"), help="where runs will be written")
    parser.add_argument("--lock", type=user_path, help="another lock file to compare versions with")
    parser.add_argument("--no-network", action="store_true", help="leave the processes' meeting out")


def run(options: argparse.Namespace) -> int:
    """Print a line for each finding; 1 when one of them is an error."""
    from rich.console import Console

    from delo_llava.cluster.doctor import findings

    console, worst = Console(), 0
    for found in findings(options.folder, options.lock, not options.no_network):
        style = STYLE[found.level]
        console.print(f"[{style}]{found.level:<7}[/] {found.name:<10}", end=" ")
        console.print(found.text, markup=False, highlight=False, soft_wrap=True)
        if found.remedy:
            console.print(f"{'':<18} -> {found.remedy}", markup=False, highlight=False, soft_wrap=True)
        worst |= found.level == "error"
    return int(worst)


COMMAND = Command(arguments, run)
