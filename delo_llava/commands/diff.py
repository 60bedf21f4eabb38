"""Show what two runs do not have in common: configuration, conditions, versions, adapters, scores."""

import argparse
import importlib

from delo_llava.commands.base import Command
from delo_llava.files import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Two runs."""
    parser.add_argument("first", type=user_path, help="folder with a results.json")
    parser.add_argument("second", type=user_path)
    parser.add_argument("--output", type=user_path, help="also write the differences to this JSON file")


def run(options: argparse.Namespace) -> int:
    """Show; 1 when anything differs, as with `diff`.

    Raises:
        DeloError: a folder without results.
    """
    from delo_llava.files import write_json_atomic

    harness = importlib.import_module("delo_eval.compare.diff")
    found = harness.diff_runs(options.first, options.second)
    importlib.import_module("delo_eval.tables").show(*harness.shown(found))
    if options.output is not None:
        write_json_atomic(options.output, found.to_json())
    return 0 if found.same else 1


COMMAND = Command(arguments, run)
