"""The sbatch script of a job: rendezvous from the node list, a launcher a node, save and requeue on signals.

What makes it work was tried on a real cluster (tests/distributed/test_slurm.py, docs/reliability.md):
USR1 reaches the batch shell before the time limit, TERM comes with preemption; the ranks save and leave with
code 75; the script puts the job back into the queue, where the same command goes on.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from delo_llava.engines.signals import EXIT_CODE
from delo_llava.errors import DeloError

TEMPLATE = Path(__file__).parent / "configs" / "job.sbatch.jinja"


@dataclass(frozen=True)
class SlurmJob:
    """A job as the user describes it.

    Attributes:
        words: what `launch/train.py` (or `launch/evaluate.py`) is given.
        output: folder of the run; of an array, the parent of its runs.
        gpus: GPUs of a node, one rank each; 0 on nodes without, then `ranks` processes a node.
        cpus: CPU cores of a node.
        methods, seeds: when given, a job array over their product; each gets an output folder of its own.
        logs: folder of SLURM's output files.
        setup: shell lines that prepare the environment (module load …, source …/activate).
        container: an image for SLURM's pyxis plug-in; `mounts` as it takes them.
        warning: seconds before the time limit at which the job is asked to save.
        extra: further #SBATCH options, `name=value`.
    """

    words: Sequence[str]
    output: Path
    task: Literal["train", "evaluate"] = "train"
    name: str = "delo-llava"
    nodes: int = 1
    gpus: int = 8
    ranks: int = 1
    cpus: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    methods: Sequence[str] = ()
    seeds: Sequence[int] = ()
    logs: Path = Path("logs")
    setup: Sequence[str] = ()
    container: str | None = None
    mounts: str | None = None
    warning: int = 300
    extra: Sequence[str] = ()

    @property
    def slots(self) -> int:
        """Ranks of a node."""
        return self.gpus or self.ranks

    @property
    def array(self) -> list[tuple[str, int]]:
        """(method, seed) of every job of the array; empty without one."""
        return [(method, seed) for method in self.methods for seed in self.seeds]


def script(job: SlurmJob) -> str:
    """The whole sbatch script; every word of the user's reaches the shell quoted.

    Raises:
        DeloError: a number that makes no job, or an array that lacks methods or seeds.
    """
    from jinja2 import Environment, StrictUndefined

    _check(job)
    engine = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    engine.filters["quote"] = lambda value: shlex.quote(str(value))
    return engine.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        options=_options(job),
        setup=job.setup,
        threads=max(1, job.cpus // job.slots),
        slots=job.slots,
        array=job.array,
        output=job.output,
        words=" ".join(map(shlex.quote, job.words)),
        train=job.task == "train",
        container=_container(job),
        code=EXIT_CODE,
    ) + "\n"  # fmt: skip


def _check(job: SlurmJob) -> None:
    for name, value in {"nodes": job.nodes, "ranks": job.ranks, "cpus": job.cpus}.items():
        if value < 1:
            raise DeloError(f"A job needs at least one of --{name}.", given=value)
    if job.gpus < 0:
        raise DeloError("There are no fewer than 0 GPUs.", given=job.gpus)
    if bool(job.methods) != bool(job.seeds):
        given = f"methods {list(job.methods)}, seeds {list(job.seeds)}"
        raise DeloError("A job array needs both --methods and --seeds.", given=given)
    for text in (job.name, job.time, str(job.logs), *job.extra, job.partition or "", job.account or ""):
        if "\n" in text:
            raise DeloError("An option of SLURM cannot hold a line break.", given=repr(text))


def _options(job: SlurmJob) -> list[str]:
    """What stands behind `#SBATCH --`."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "array": f"0-{len(job.array) - 1}" if job.array else None,
        "output": job.logs / ("%x-%A_%a.out" if job.array else "%x-%j.out"),
        "signal": f"B:USR1@{job.warning}",
        "open-mode": "append",
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [*given, "requeue", *(option.removeprefix("--") for option in job.extra)]


def _container(job: SlurmJob) -> str:
    if job.container is None:
        return ""
    mounts = f"--container-mounts={shlex.quote(job.mounts)} " if job.mounts else ""
    return f"--container-image={shlex.quote(job.container)} {mounts}"
