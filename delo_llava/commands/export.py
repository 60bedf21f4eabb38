"""Merge what a run trained into its base and write a plain Hugging Face folder."""

import argparse
from pathlib import Path

from delo_llava.commands.base import Command, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which stage of which run, where to, and in which number format."""
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--stage", default="last", help="name, index from 0, or last")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of all weights (auto: the checkpoint's own)",
    )
    parser.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="for 4-bit runs: add to the weights that were trained on, or to the checkpoint's own",
    )
    parser.add_argument("--device", default="auto", help="where to load the model: auto, cpu, cuda")


def run(options: argparse.Namespace) -> int:
    """Write the folder and say what is in it."""
    from delo_llava.runs.exportable import exportable_stages

    exportable_stages(options.run, options.stage, options.out)  # before torch is loaded, which takes seconds
    from delo_llava.runs.export import export_stage

    facts = export_stage(
        options.run, options.stage, options.out,
        dtype=options.dtype, onto=options.onto, device=options.device,
    )  # fmt: skip
    took = facts["rounding"]["largest"]
    say(f"{options.out}: {facts['method']['name']} after {facts['stage']}, {facts['dtype']}\n")
    say(f"{facts['rounding']['linears']} weights merged; rounding took at most {took:.1%} of an update\n")
    return 0


COMMAND = Command(arguments, run)
