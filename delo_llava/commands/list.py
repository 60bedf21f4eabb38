"""Show what is installed: methods, recipes, backbones, scorers, metrics, ..."""

import argparse

from delo_llava.commands.base import Command, say
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
    names = plugin_names(kind)
    width = max(map(len, names), default=0)
    for name in names:
        say(f"{name:<{width}}  {plugin_summary(kind, name)}".rstrip() + "\n")
        if limits := plugin_limits(kind, name):
            say(f"{'':<{width}}  limits: {limits}\n")
    return 0


COMMAND = Command(arguments, run)
