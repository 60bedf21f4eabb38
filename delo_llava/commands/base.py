"""What a command is: its arguments and what it does; the first line of its module is its help."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from delo_llava.errors import printable
from delo_llava.registry import load_plugin, plugin_summary


@dataclass(frozen=True)
class Command:
    """One word after `delo-llava`.

    Attributes:
        arguments: adds the command's arguments to a parser made for it.
        run: does the work and returns the exit code; mistakes are `DeloError`s. It imports what is heavy
            itself, so that the help of a command stays instant.
        keys: words that are no argument of the command are keys of the configuration (`--train.lr=1e-3`) and
            reach it as `options.rest`.
    """

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    keys: bool = False


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of a command line (argparse's `type`), not below `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return value

    return number


def say(text: str) -> None:
    """Write to standard output, what a terminal would obey written out."""
    sys.stdout.write(printable(text))


def listed(rows: Sequence[tuple[str, str]], indent: int = 0) -> str:
    """Names, each with what is said of it, in two columns as wide as the terminal; a pipe gets whole lines.

    Args:
        rows: (name, text); a row without a name continues the one above.
    """
    names = indent + max((len(name) for name, _ in rows), default=0) + 2
    width = max(names + 20, shutil.get_terminal_size((10_000, 24)).columns)
    lines: list[str] = []
    for name, text in rows:
        head = f"{' ' * indent}{name}".ljust(names)
        wrapped = textwrap.wrap(
            text, width, initial_indent=head, subsequent_indent=" " * names, break_long_words=False
        )
        lines += wrapped or [head.rstrip()]
    return "".join(f"{line}\n" for line in lines)


def run_command(kind: str, words: Sequence[str], prog: str) -> int:
    """Run the command that the first word names, with the others as its arguments; returns the exit code.

    Args:
        kind: the registry's kind of the command, `command` or `eval_command`.
        prog: the program's name, for usage messages.
    """
    command = cast(Command, load_plugin(kind, words[0]))
    parser = argparse.ArgumentParser(
        prog=f"{prog} {words[0]}", description=plugin_summary(kind, words[0]), allow_abbrev=False
    )
    command.arguments(parser)
    if not command.keys:
        return command.run(parser.parse_args(words[1:]))
    options, rest = parser.parse_known_args(words[1:])
    options.rest = rest
    return command.run(options)
