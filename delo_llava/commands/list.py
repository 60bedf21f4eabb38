"""Show what is installed: methods, recipes, backbones, scorers, metrics, ..."""

import argparse

from delo_llava.commands.base import Command, listed, say
from delo_llava.registry import plugin_limits, plugin_names, plugin_summary

#: Words of the command and the registry's kinds.
LISTS = {
    "methods": "method",
    "recipes": "recipe",
    "backbones": "backbone",
    "scorers": "scorer",
    "metrics": "metric",
    "zero": "zero",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The kind of plug-in to list."""
    parser.add_argument("what", choices=LISTS)


def run(options: argparse.Namespace) -> int:
    """Names of the plug-ins of one kind, each with its first line of documentation and, below, its limits."""
    kind = LISTS[options.what]
    rows: list[tuple[str, str]] = []
    for name in plugin_names(kind):
        rows.append((name, plugin_summary(kind, name)))
        if limits := plugin_limits(kind, name):
            rows.append(("", f"limits: {limits}"))
    say(listed(rows))
    return 0


COMMAND = Command(arguments, run)
