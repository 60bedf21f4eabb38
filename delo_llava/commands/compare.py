"""Put runs side by side: a leaderboard in the terminal, Markdown, LaTeX and HTML, with paired differences."""

import argparse
import importlib

from delo_llava.commands.base import Command, at_least, say
from delo_llava.files import user_path

FORMATS = ("md", "latex", "json", "html")
_ALIASES = {"markdown": "md", "tex": "latex"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Runs, whether differing ones may be shown, and where to write."""
    parser.add_argument(
        "runs", nargs="+", type=user_path, help="folders with a results.json; the first is the reference"
    )
    parser.add_argument(
        "--force", action="store_true", help="show rows that do not compare, each difference marked"
    )
    parser.add_argument(
        "--published", action="append", default=[], metavar="NAME",
        help="add the rows of a published table (`delo-eval published list`)",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        type=user_path,
        help="folder for leaderboard.md, leaderboard.tex, compare.json, compare.html",
    )
    parser.add_argument(
        "--format", default=",".join(FORMATS), help="which of them, comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--resamples",
        type=at_least(100),
        default=10_000,
        help="of the paired bootstrap (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Compare, show and write.

    Raises:
        DeloError: runs that must not be compared, an unknown format, too few resamples, or no results.
    """
    formats = checked_formats(options.format)
    board = importlib.import_module("delo_eval.compare.leaderboard")
    found = importlib.import_module("delo_eval.compare.assemble").compare(
        options.runs, force=options.force, published=options.published, resamples=options.resamples
    )
    importlib.import_module("delo_eval.tables").show(*board.terminal(found))
    if options.output is not None:
        files = board.write(found, options.output, [name for name in formats if name != "html"])
        if "html" in formats:
            page = importlib.import_module("delo_eval.report.compare")
            files.append(page.render_comparison(found, options.output))
        say("".join(f"{file}\n" for file in files))
    return 0


def checked_formats(given: str) -> list[str]:
    """The formats that a comma-separated word names, each once.

    Raises:
        DeloError: an unknown one.
    """
    from delo_llava.errors import DeloError

    names = [_ALIASES.get(name, name) for name in map(str.strip, given.split(","))]
    for name in names:
        if name not in FORMATS:
            raise DeloError("There is no such format.", given=name, allowed=FORMATS)
    return list(dict.fromkeys(names))


COMMAND = Command(arguments, run)
