"""The command line: `train`, `eval`, and the commands of `delo_llava/commands/`, imported when run."""

import argparse
import importlib
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from delo_llava import __version__
from delo_llava.endings import told
from delo_llava.engines import signals
from delo_llava.engines.launched import launched, speaks
from delo_llava.errors import DeloError
from delo_llava.extras import require_extra
from delo_llava.files import at_home, name_or_path
from delo_llava.registry import load_plugin, plugin_names, plugin_summary

if TYPE_CHECKING:
    from delo_llava.config import RunConfig

TRAIN_USAGE = """usage: delo-llava train [--config FILE] [--print_config] [--dry_run] [--KEY=VALUE ...]

Train a task sequence and evaluate after each task; on several devices: `deepspeed launch/train.py` with
the same words. Values are laid over each other: code < recipe < FILE < command line.

  delo-llava train --task_seq mini6 --method delo --seed 1 --output runs/x --missing.ratio 0.7
  delo-llava train --config my.yaml --train.lr=1e-4 --print_config     # write what would be run, and stop
  delo-llava train --config my.yaml --dry_run                          # check all of it: data, memory, disk

keys, with their defaults before recipe and file:
"""
METHOD_USAGE = """
options of the method `{name}` (of others: --help --method NAME):
"""
OTHER_HELP = """
options of a method begin with its name: `--help --method {name}` says what they are
"""

#: Words that stop before the run: say its settings; check all of it and say what it needs.
PRINT_CONFIG, DRY_RUN = ("--print_config", "--print-config"), ("--dry_run", "--dry-run")


class _Harness(Protocol):
    """What the command line needs of `delo_eval.harness.run`."""

    def main(self, argv: Sequence[str]) -> int | None: ...
    def evaluate_stage(self, run_dir: Path, stage: int) -> object: ...


class _Scorer(Protocol):
    """What the command line needs of a scorer: whether it can be used here, in the mode that is asked for."""

    def in_mode(self, scoring: str) -> "_Scorer": ...
    def check(self, references: Sequence[object]) -> None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script `delo-llava`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        return main_train(words[1:])
    if words[:1] == ["eval"]:
        return told(_eval, words[1:], goes_on=True)
    return told(_command, words)


def main_train(argv: Sequence[str] | None = None) -> int:
    """Entry point of `delo-llava train` and, on each rank, of `launch/train.py`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        return told(_train_help, words)
    signals.install()
    return told(_train, words, goes_on=True)


def resolve(words: Sequence[str]) -> "RunConfig":
    """The configuration a command line asks for; the data is looked for before anything heavy is imported.

    Words are `--config FILE` and overrides; `--local_rank`, which the launcher appends, is ignored.

    Raises:
        DeloError: an unknown key, value or recipe, data or a package that is missing, or official scoring
            where none is.
    """
    from delo_llava.config import RunConfig, check_tasks, core_config, with_methods
    from delo_llava.data.recipe import load_sequence, located_root, recipe_defaults

    layers = _layers(words)
    sequence_name = str(layers.get("task_seq", RunConfig.model_fields["task_seq"].default))
    defaults = recipe_defaults(name_or_path(sequence_name))
    config = core_config(layers, defaults)
    sequence = load_sequence(config.task_seq, config.data.root, config.data.template)
    check_tasks(config, sequence.names)
    for task in sequence.tasks:
        cast(_Scorer, load_plugin("scorer", task.scorer)).in_mode(config.eval.scoring).check(())
    if config.train.tensorboard:
        require_extra("track", "train.tensorboard")
    return with_methods(config).located(located_root(config.task_seq, config.data.root))


def _layers(words: Sequence[str]) -> dict[str, Any]:
    """What file and command line set."""
    from delo_llava.config import config_layers

    file, words = _take(words, "--config")
    _, words = _take(words, "--local_rank")
    return config_layers(at_home(file) if file else None, words)


def _train(words: Sequence[str]) -> int:
    """Resolve the configuration and run the sequence."""
    rest = [word for word in words if word not in (*PRINT_CONFIG, *DRY_RUN)]
    config = resolve(rest)
    if set(PRINT_CONFIG) & set(words):
        from delo_llava.config import dump_config

        _say(dump_config(config))
        return 0
    _tell_unused(config, _layers(rest).get("methods", {}))
    job = importlib.import_module("delo_llava.runs.job").make_job(config)
    if set(DRY_RUN) & set(words):
        if speaks():
            importlib.import_module("delo_llava.cluster.dry_run").dry_run(job, launched().world)
        return 0
    sequence = importlib.import_module("delo_llava.runs.sequence")
    sequence.run_sequence(job, _harness().evaluate_stage, planned_bytes)
    return 0


def _tell_unused(config: "RunConfig", given: Collection[str]) -> None:
    """Say which of the methods whose options were `given` decide nothing: neither the method that is run nor
    its size looks at them.
    """
    used = {config.method, config.methods[config.method].get("like")}
    unused = [f"--{name}.…" for name in given if name not in used]
    if unused and speaks():
        sys.stderr.write(f"{', '.join(unused)}: without effect, the method is {config.method}\n")


def planned_bytes(config: "RunConfig", world: int, cuda: bool) -> int:
    """The planner's word, which is asked when memory is full and not imported before."""
    from delo_llava.cluster import advice

    return advice.planned_bytes(config, world, cuda)


def _eval(words: Sequence[str]) -> int:
    """Hand over to the harness, which has a command line of its own."""
    signals.install()
    return _harness().main(words) or 0


def _harness() -> _Harness:
    """The harness; only the command line knows of it, the library gets what it needs as a callback."""
    return cast(_Harness, importlib.import_module("delo_eval.harness.run"))


def _command(words: Sequence[str]) -> int:
    """Run the command that the first word names."""
    from delo_llava.commands.base import run_command

    _parser().parse_args(words[:1])
    return run_command("command", words, "delo-llava")


def _parser() -> argparse.ArgumentParser:
    """The parser of the first word; each command reads the rest."""
    parser = argparse.ArgumentParser(
        prog="delo-llava", description="DeLo experts for vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"delo-llava {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="command")
    commands.add_parser("train", help="train a task sequence and evaluate after each task", add_help=False)
    commands.add_parser(
        "eval", help="evaluate a saved stage of a run (the same as delo-eval)", add_help=False
    )
    for name in plugin_names("command"):
        commands.add_parser(name, help=plugin_summary("command", name), add_help=False)
    return parser


def _take(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag value` or `--flag=value`, and the other words; the last one counts."""
    value, rest = None, []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.partition("=")
        if name.replace("-", "_") != flag.replace("-", "_"):
            rest.append(word)
        elif equals or queue:
            value = text if equals else queue.pop(0)
        else:
            raise DeloError(f"{flag} needs a value.")
    return value, rest


def _train_help(words: Sequence[str]) -> int:
    """Say what can be set, and the options of a method that is named beside `--help`: only these need what
    methods import, torch for one, which takes seconds.
    """
    from delo_llava import keys
    from delo_llava.config import RunConfig

    width = shutil.get_terminal_size().columns
    name = _take(words, "--method")[0]
    if name is None:
        more = OTHER_HELP.format(name=RunConfig.model_fields["method"].default)
    else:
        more = METHOD_USAGE.format(name=name) + keys.render(keys.method_keys(name), width)
    _say(TRAIN_USAGE + keys.render(keys.run_keys(), width) + more)
    return 0


def _say(text: str) -> None:
    """Write to standard output."""
    sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
