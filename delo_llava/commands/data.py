"""Look after data: check a sequence, show its records, prepare it from official downloads."""

import argparse
import sys
from typing import TYPE_CHECKING

from delo_llava.commands import _fixture, _prepare
from delo_llava.commands.base import Command, at_least, say
from delo_llava.files import user_path

if TYPE_CHECKING:
    from rich.console import Console

    from delo_llava.config import RunConfig
    from delo_llava.data_tools.prompts import Prompts
    from delo_llava.tasks import TaskSequence

#: Columns of tables that do not go to a terminal.
WIDTH = 150


def arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command each."""
    commands = parser.add_subparsers(required=True, metavar="command")
    _check_arguments(commands.add_parser("check", help="look for everything that would go wrong in training"))
    _show_arguments(commands.add_parser("show", help="show records as a run would see them"))
    _leak_arguments(commands.add_parser("leak", help="how well the words of records alone tell their task"))
    _prepare.arguments(commands.add_parser("prepare", help="make data of official downloads on this disk"))
    _fixture.arguments(commands.add_parser("fixture", help="write a small set in a recipe's exact layout"))


def run(options: argparse.Namespace) -> int:
    """Hand over to the sub-command."""
    code: int = options.data(options)
    return code


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _sequence_arguments(parser)
    parser.add_argument(
        "--report", type=user_path, help="JSONL file for every fault (default: beside --state)"
    )
    parser.add_argument(
        "--state", type=user_path, help="memory of checked images (default: in the cache folder)"
    )
    workers = "processes that decode images, from 1 (default: one per core)"
    parser.add_argument("--workers", type=at_least(1), help=workers)
    parser.add_argument(
        "--show", type=at_least(0), default=40, metavar="N", help="faults told on the terminal"
    )
    parser.add_argument("--no-tokens", action="store_true", help="do not tokenise the prompts")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="CODE", help="tell faults of this kind as notes only"
    )
    parser.set_defaults(data=_check)


def _sequence_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data, and how a run would read it."""
    _recipe_arguments(parser)
    parser.add_argument("--model", help="whose tokenizer is used (default: the recipe's, if on this disk)")
    _settings(parser, "data.max_length", "data.template")
    _settings(parser, "data.min_pixels", "data.max_pixels", "data.max_tiles")


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data."""
    parser.add_argument("recipe", help="a recipe's name or file")
    root = "data root, as in training (default: $DELO_LLAVA_DATA, else data/<name>)"
    parser.add_argument("--root", "--data.root", dest="root", type=user_path, help=root)


def _settings(parser: argparse.ArgumentParser, *keys: str) -> None:
    """Settings of a run, under their own names."""
    for key in keys:
        parser.add_argument(f"--{key}", dest=key, metavar="X", help="as in training (default: the recipe's)")


def _config(options: argparse.Namespace) -> "RunConfig":
    """The configuration that a run with these words would have."""
    from delo_llava.config import config_layers, core_config
    from delo_llava.data.recipe import recipe_defaults

    given = {key: value for key, value in vars(options).items() if "." in key or key == "model"}
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    layers = config_layers(None, [f"--task_seq={options.recipe}", *words])
    return core_config(layers, recipe_defaults(options.recipe))


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _sequence_arguments(parser)
    _settings(parser, "data.sub", "seed", *(f"missing.{key}" for key in ("ratio", "kind", "seed", "image")))
    parser.add_argument("--task", action="append", metavar="NAME", help="a task (default: each)")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"))
    parser.add_argument("-n", type=at_least(1), default=3, dest="count", help="how many records (default: 3)")
    parser.add_argument(
        "--start", type=at_least(0), default=0, metavar="I", help="the first one's place in its file"
    )
    parser.add_argument("--id", action="append", default=[], help="a record's id, instead of -n and --start")
    parser.add_argument("--tokens", action="store_true", help="show every token by itself")
    parser.add_argument("--no-preview", action="store_true", help="draw no pictures on the terminal")
    parser.add_argument(
        "--html", type=user_path, metavar="FILE", help="also write a page with everything in it"
    )
    parser.add_argument("--png", type=user_path, metavar="FILE", help="also write a contact sheet")
    parser.set_defaults(data=_show)


def _prompts(options: argparse.Namespace, config: "RunConfig", sequence: "TaskSequence") -> "Prompts":
    """The tokenizer of the model that was named, else of the recipe's, else (said) of the stand-in."""
    from delo_llava.backbones.base import find_backbone
    from delo_llava.data_tools.prompts import STAND_IN, Prompts, local_model
    from delo_llava.runs.job import base_config
    from delo_llava.runs.positions import within_positions

    model = options.model or local_model(config.model)
    if model is None:
        say(
            f"{config.model} is not on this disk: prompts are made with the tokenizer of {STAND_IN}, "
            "so counts of tokens differ; --model names another\n"
        )
    else:
        named = config.model_copy(update={"model": model})
        config, notes = within_positions(named, base_config(find_backbone(model)[1]))
        for note in notes:
            say(f"{note}\n")
    return Prompts(model or STAND_IN, config.data.max_length, config.data.limits, sequence.rooms)


def _console() -> "Console":
    """Standard output; wide where it is no terminal, so that tables are not broken."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _check(options: argparse.Namespace) -> int:
    """Check a sequence's data; 1 when something is wrong with it."""
    import os

    from delo_llava.data.recipe import load_sequence
    from delo_llava.data_tools.check import DataCheck
    from delo_llava.data_tools.faults import FAULTS
    from delo_llava.data_tools.memory import Memory, default_state
    from delo_llava.data_tools.report import show_report, write_report
    from delo_llava.errors import DeloError

    for code in options.allow:
        if code not in FAULTS:
            raise DeloError("Unknown kind of fault.", given=code, allowed=FAULTS)
    config = _config(options)
    sequence = load_sequence(options.recipe, options.root, config.data.template)
    state = options.state or default_state(sequence)
    report = options.report or state.with_suffix(".jsonl")
    prompts = None if options.no_tokens else _prompts(options, config, sequence)
    with Memory(state) as memory:
        check = DataCheck(sequence, memory, prompts, options.workers or os.cpu_count() or 1)
        parts = check.run()
        memory.accept(options.allow)
        faults = write_report(report, check, parts)
        show_report(_console(), check, parts, report, options.show)
    say(f"{faults} faults; report: {report}\n")
    return 1 if faults else 0


def _show(options: argparse.Namespace) -> int:
    """Show records on the terminal, and in files where asked."""
    from delo_llava.data.readers import read_records
    from delo_llava.data.recipe import load_sequence
    from delo_llava.data_tools.show_files import write_html, write_sheet
    from delo_llava.data_tools.show_text import show
    from delo_llava.data_tools.shown import choose, shown
    from delo_llava.errors import DeloError

    config = _config(options)
    sequence = load_sequence(options.recipe, options.root, config.data.template)
    if unknown := set(options.task or ()) - set(sequence.names):
        raise DeloError("There is no such task.", given=min(unknown), allowed=sequence.names)
    prompts, console, items = _prompts(options, config, sequence), _console(), []
    for task in sequence.tasks:
        if options.task and task.name not in options.task:
            continue
        sub = config.data.sub if options.split == "train" else 1.0
        records = read_records(task, options.split, sub, config.seed)
        chosen = choose(records, options.count, options.start, options.id)
        for item in shown(task, records, chosen, config.missing, prompts):
            show(console, item, not options.no_preview, options.tokens)
            items.append(item)
    if options.html:
        write_html(options.html, f"{sequence.name}, {options.split}", items)
    if options.png:
        write_sheet(options.png, items)
    return 0


def _leak_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    _settings(parser, "data.template")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="(default: %(default)s)")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="also write it as JSON")
    parser.set_defaults(data=_leak)


def _leak(options: argparse.Namespace) -> int:
    """Say what words tell of the task, beside which a choice of the task is to be read."""
    from delo_llava.data.recipe import load_sequence
    from delo_llava.data_tools.leak import leak_json, leak_table, leaks
    from delo_llava.files import write_json_atomic

    template = vars(options)["data.template"]
    sequence = load_sequence(options.recipe, options.root, template or _config(options).data.template)
    found = leaks(sequence, options.split)
    _console().print(leak_table(found))
    if options.output:
        write_json_atomic(options.output, leak_json(sequence, found))
    return 0


COMMAND = Command(arguments, run)
