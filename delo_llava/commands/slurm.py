"""Write (and submit) an sbatch script: several nodes, save and requeue before the time limit, job arrays."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from delo_llava.commands.base import Command, at_least, say
from delo_llava.errors import DeloError
from delo_llava.files import user_path

if TYPE_CHECKING:
    from delo_llava.cluster.slurm import SlurmJob


def arguments(parser: argparse.ArgumentParser) -> None:
    """The job; all other words are those of `train` (or, with --evaluate, of `delo-eval`)."""
    parser.epilog = "Other words are those of `train`, e.g. --task_seq coin6 --zero 2 --train.micro_batch=4"
    add = parser.add_argument
    add("--nodes", type=at_least(1), default=1)
    add("--gpus", type=at_least(0), default=8, help="GPUs of a node, one rank each; 0 on nodes without")
    add("--ranks", type=at_least(1), default=1, help="ranks of a node without GPUs")
    add("--cpus", type=at_least(1), default=8, help="CPU cores of a node's job")
    add("--time", type=_time, default="24:00:00", help="limit of the job, as SLURM writes it: 24:00:00, 2-12")
    add("--job-name", default=None)
    add("--partition")
    add("--account")
    add("--methods", nargs="+", default=(), help="with --seeds: a job array over methods × seeds")
    add("--seeds", nargs="+", type=int, default=())
    add("--output", type=user_path, help="the run's folder; of an array, the parent of its runs")
    add("--logs", type=user_path, default=Path("logs"), help="folder of SLURM's output files")
    add(
        "--setup", action="append", default=[], help="a shell line before the job (module load …); repeatable"
    )
    add("--container", help="image for the pyxis plug-in")
    add("--mounts", help="the container's mounts, as pyxis takes them")
    add(
        "--warning",
        type=at_least(0),
        default=300,
        help="seconds before the time limit at which the job saves",
    )
    add("--sbatch", action="append", default=[], help="a further #SBATCH option, name=value; repeatable")
    add("--evaluate", action="store_true", help="evaluate saved stages instead of training")
    add("--script", type=user_path, help="where to write it (default: print it)")
    add("--submit", action="store_true", help="hand it to sbatch")


def _time(text: str) -> str:
    """A time limit that SLURM takes: m[:s], h:m:s or d-h[:m[:s]].

    Raises:
        argparse.ArgumentTypeError: another text.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit such as 90, 24:00:00 or 2-12:00")
    return text


def run(options: argparse.Namespace) -> int:
    """Check the words as training would, write the script, submit it if asked to."""
    from delo_llava.cluster.slurm import script

    text = script(_job(options))
    if options.script is None and not options.submit:
        say(text)
        return 0
    path = options.script or Path(f"{_name(options)}.sbatch")
    _write(path, text)
    options.logs.mkdir(parents=True, exist_ok=True)  # sbatch drops the output of a job without this folder
    say(f"script: {path}\n")
    return _submit(path) if options.submit else 0


def _job(options: argparse.Namespace) -> "SlurmJob":
    from delo_llava.cluster.slurm import SlurmJob

    return SlurmJob(
        words=options.rest,
        output=Path() if options.evaluate else _checked_output(options),
        task="evaluate" if options.evaluate else "train",
        name=_name(options),
        nodes=options.nodes,
        gpus=options.gpus,
        ranks=options.ranks,
        cpus=options.cpus,
        time=options.time,
        partition=options.partition,
        account=options.account,
        methods=options.methods,
        seeds=options.seeds,
        logs=options.logs,
        setup=options.setup,
        container=options.container,
        mounts=options.mounts,
        warning=options.warning,
        extra=options.sbatch,
    )


def _checked_output(options: argparse.Namespace) -> Path:
    """The run's folder (of an array, the parent), once every word is known to be right.

    Raises:
        DeloError: a wrong key or value, or batches that the ranks cannot share.
    """
    from delo_llava.config import config_layers, core_config
    from delo_llava.data.recipe import read_recipe, recipe_defaults
    from delo_llava.data.sampler import plan_accumulation

    given = ["--output", str(options.output)] if options.output else []
    for method in options.methods or [None]:
        words = [*options.rest, *given, *(["--method", method] if method else [])]
        layers = config_layers(None, words)
        config = core_config(layers, recipe_defaults(str(layers.get("task_seq", "mini6"))))
        world = options.nodes * (options.gpus or options.ranks)
        for task in read_recipe(config.task_seq).tasks:
            train = config.for_task(task.name).train
            plan_accumulation(train.global_batch, train.micro_batch, world)
    return config.run_dir if not options.methods else options.output or Path("runs")


def _name(options: argparse.Namespace) -> str:
    if options.job_name:
        return str(options.job_name)
    return "delo-llava-eval" if options.evaluate else "delo-llava"


def _write(path: Path, text: str) -> None:
    from delo_llava.files import write_text_atomic

    write_text_atomic(path, text)
    path.chmod(0o755)


def _submit(path: Path) -> int:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        fix = f"on a login node: sbatch {shlex.quote(str(path))}"
        raise DeloError("There is no sbatch on this machine.", given=path, fix=fix)
    done = subprocess.run([sbatch, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeloError(f"SLURM refused the job: {done.stderr.strip()}", given=path)
    say(done.stdout)
    return 0


COMMAND = Command(arguments, run, keys=True)
