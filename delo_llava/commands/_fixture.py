"""`delo-llava data fixture`: a small set in a recipe's exact layout, for trials without the real data."""

import argparse

from delo_llava.commands.base import at_least, say
from delo_llava.files import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, where to write, and how much."""
    parser.add_argument("recipe", help="a shipped recipe's name")
    parser.add_argument(
        "--output", type=user_path, required=True, help="an empty or new folder: the data root"
    )
    parser.add_argument("--records", type=at_least(1), default=48, help="training records of each task")
    parser.set_defaults(data=run)


def run(options: argparse.Namespace) -> int:
    """Write a fixture and say how it is used."""
    from delo_llava.mini.fixtures import write_fixture

    root = write_fixture(options.recipe, options.output, options.records)
    say(f"{options.recipe}: a fixture of {options.records} training records a task in {root}\n")
    say(f"use it with --task_seq {options.recipe} --data.root {root} --model mini-llava\n")
    return 0
