"""Show published tables: source, protocol, certainty, and whether their aggregates follow from their rows."""

import argparse

from delo_llava.commands.base import Command, listed, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """`list`, or `show` one."""
    commands = parser.add_subparsers(dest="what", metavar="list | show NAME")
    commands.add_parser("list", help="names and titles (also without a word)")
    show = commands.add_parser("show", help="one table, its protocol and the recomputed aggregates")
    show.add_argument("name", help="of a table, or a YAML file of your own")


def run(options: argparse.Namespace) -> int:
    """Print."""
    if options.what == "show":
        from delo_eval.published.base import load_table
        from delo_eval.published.show import shown
        from delo_eval.tables import show

        show(*shown(load_table(options.name)))
        return 0
    from delo_llava.registry import plugin_names, plugin_summary

    say(listed([(name, plugin_summary("published", name)) for name in plugin_names("published")]))
    return 0


COMMAND = Command(arguments, run)
