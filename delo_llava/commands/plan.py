"""Plan a job before it is submitted: memory by part, what fits which GPU, steps, traffic, disk, time."""

import argparse
from typing import TYPE_CHECKING

from delo_llava.commands.base import Command, at_least
from delo_llava.files import user_path

if TYPE_CHECKING:
    from delo_llava.config import RunConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """The machine and what is known of the data; all other words are keys of the configuration."""
    parser.epilog = "Other words are those of `train`: --model, --task_seq, --method, --zero, --train.…=…"
    parser.add_argument("--config", type=user_path, help="a YAML file of the run")
    parser.add_argument("--nodes", type=at_least(1), default=1)
    parser.add_argument("--gpus", type=at_least(1), default=1, help="GPUs of a node")
    parser.add_argument(
        "--tokens", type=at_least(1), help="longest sequence, image included (default: max_length)"
    )
    parser.add_argument(
        "--image_tokens", type=at_least(1), help="tokens of an image, where its size decides them"
    )
    parser.add_argument("--records", help="training records: N of every task, or task=N,task=N")
    parser.add_argument("--samples_per_second", type=float, help="measured throughput of all GPUs together")
    parser.add_argument("--from_run", type=user_path, help="a run whose measured throughput is scaled")
    parser.add_argument("--json", type=user_path, help="also write the plan there")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    from rich.console import Console

    from delo_llava.cluster.plan import Job, make_plan, tables

    job = Job(
        options.nodes, options.gpus, options.tokens, options.image_tokens, options.records,
        options.samples_per_second, options.from_run,
    )  # fmt: skip
    with Console(stderr=True).status("planning: a training step is run in shapes for every choice"):
        plan = make_plan(_config(options), job)
    for part in tables(plan):
        Console().print(part)
    if options.json is not None:
        from delo_llava.files import write_json_atomic

        write_json_atomic(options.json, plan)
    return 0 if {*plan["fits"]} & {*plan["evaluation_fits"]} else 1


def _config(options: argparse.Namespace) -> "RunConfig":
    """The run's configuration; the data need not be there."""
    from delo_llava.config import config_layers, core_config, with_methods
    from delo_llava.data.recipe import recipe_defaults

    layers = config_layers(options.config, options.rest)
    sequence = str(layers.get("task_seq", "mini6"))
    return with_methods(core_config(layers, recipe_defaults(sequence)))


COMMAND = Command(arguments, run, keys=True)
