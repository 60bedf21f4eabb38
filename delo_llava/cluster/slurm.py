"""The sbatch script of a job: rendezvous from the node list, one launcher a node, save and requeue on signals.

What makes it work was tried on a real cluster (tests/distributed/test_slurm.py, docs/reliability.md):
USR1 reaches the batch shell before the time limit, TERM comes with preemption; the ranks save and leave with
code 75; the script puts the job back into the queue, where the same command goes on.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from delo_llava.errors import DeloError
from delo_llava.training.signals import EXIT_CODE

#: Seconds before the time limit at which the job is asked to save.
WARNING_SECONDS = 300


@dataclass(frozen=True)
class SlurmJob:
    """A job as the user describes it.

    Attributes:
        words: what `launch/train.py` (or `launch/evaluate.py`) is given.
        gpus: GPUs of a node, one rank each; 0 for nodes without, then `ranks` processes a node.
        methods, seeds: when given, a job array over their product; each gets an output folder of its own.
        setup: shell lines that prepare the environment (module load …, source …/activate).
        container: an image for SLURM's pyxis plug-in; mounts as it takes them.
        extra: further #SBATCH options, `name=value`.
    """

    words: Sequence[str]
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
    output: Path = Path("runs")
    logs: Path = Path("logs")
    setup: Sequence[str] = ()
    container: str | None = None
    mounts: str | None = None
    warning: int = WARNING_SECONDS
    extra: Sequence[str] = field(default=())

    @property
    def slots(self) -> int:
        """Ranks of a node."""
        return self.gpus or self.ranks

    @property
    def array(self) -> list[tuple[str, int]]:
        """(method, seed) of every job of the array; empty without one."""
        return [(method, seed) for method in self.methods for seed in self.seeds]


def script(job: SlurmJob) -> str:
    """The whole sbatch script.

    Raises:
        DeloError: a number that makes no job, or an array that lacks methods or seeds.
    """
    _check(job)
    parts = [_head(job), _environment(job), _rendezvous(job), _command(job), _run(job)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _check(job: SlurmJob) -> None:
    for name, value in {"nodes": job.nodes, "ranks": job.ranks, "cpus": job.cpus}.items():
        if value < 1:
            raise DeloError(f"A job needs at least one of --{name}.", given=value)
    if job.gpus < 0:
        raise DeloError("There are no fewer than 0 GPUs.", given=job.gpus)
    if bool(job.methods) != bool(job.seeds):
        raise DeloError(
            "A job array needs both --methods and --seeds.",
            given=f"methods {list(job.methods)}, seeds {list(job.seeds)}",
        )
    for text in (job.name, job.time, *job.extra, *job.setup, *(o for o in (job.partition, job.account) if o)):
        if "\n" in text:
            raise DeloError("An option of SLURM cannot hold a line break.", given=repr(text))


def _head(job: SlurmJob) -> str:
    """The #SBATCH lines."""
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
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += [f"#SBATCH --{option.removeprefix('--')}" for option in job.extra]
    return "\n".join(["#!/usr/bin/env bash", *lines])


def _environment(job: SlurmJob) -> str:
    """Modules, caches and NCCL; every value the caller has set wins."""
    lines = ["set -uo pipefail", 'cd "${SLURM_SUBMIT_DIR:-.}"', *job.setup]
    defaults = {
        "OMP_NUM_THREADS": str(max(1, job.cpus // job.slots)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A rank that died makes the others fail within minutes instead of waiting for ever.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    lines += [f'export {key}="${{{key}:-{value}}}"' for key, value in defaults.items()]
    # Builds of torch extensions must not share a folder between nodes of different kinds.
    lines.append('export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID}"')
    return "\n".join(lines)


def _rendezvous(job: SlurmJob) -> str:
    """First host of the node list (its address if the name does not resolve), a port of this job's own."""
    return f"""\
# Rendezvous: the first node of the list, by name if it resolves, else by the address SLURM knows.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR="${{hosts[0]}}"
if ! getent hosts "$MASTER_ADDR" > /dev/null; then
  MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" -o | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
fi
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
hostfile="${{TMPDIR:-/tmp}}/hosts-$SLURM_JOB_ID"
export hostlines="$(printf '%s slots={job.slots}\\n' "${{hosts[@]}}")" hostfile"""


def _command(job: SlurmJob) -> str:
    """The launcher's command, as a bash array, so that every word stays one word."""
    words = [f"launch/{job.task}.py", *job.words]
    quoted = " ".join(shlex.quote(word) for word in words)
    if not job.array:
        return f"command=({quoted})"
    methods = " ".join(shlex.quote(method) for method, _ in job.array)
    seeds = " ".join(str(seed) for _, seed in job.array)
    folder = shlex.quote(str(job.output))
    return f"""\
methods=({methods})
seeds=({seeds})
method="${{methods[$SLURM_ARRAY_TASK_ID]}}" seed="${{seeds[$SLURM_ARRAY_TASK_ID]}}"
command=({quoted} --method "$method" --seed "$seed" --output {folder}/"$method-s$seed")"""


def _run(job: SlurmJob) -> str:
    """Start one launcher a node, pass USR1 on, and requeue when the ranks left to be continued."""
    container = ""
    if job.container is not None:
        mounts = f" --container-mounts={shlex.quote(job.mounts)}" if job.mounts else ""
        container = f" --container-image={shlex.quote(job.container)}{mounts}"
    number = f"--num_gpus={job.slots} " if job.gpus == 0 else ""
    return f"""\
# The launchers ignore USR1, which the ranks themselves answer: they save at the next step and leave with {EXIT_CODE}.
# srun runs in the background, or the shell could not handle the signal while it waits.
asked=0
forward() {{ asked=1; kill -USR1 "$job" 2> /dev/null; }}
trap forward USR1
srun --kill-on-bad-exit=0{container} bash -c '
  trap "" USR1
  printf "%s\\n" "$hostlines" > "$hostfile"
  exec deepspeed --hostfile="$hostfile" --no_ssh --node_rank="$SLURM_NODEID" \\
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" {number}"$@"' launcher "${{command[@]}}" &
job=$!
while :; do
  wait "$job"
  code=$?
  kill -0 "$job" 2> /dev/null || break  # a trapped signal ends `wait` too early
done
echo "[$(date +%T)] launchers left with code $code (restart ${{SLURM_RESTART_COUNT:-0}})"
if [ "$code" -eq {EXIT_CODE} ] || {{ [ "$asked" -eq 1 ] && [ "$code" -ne 0 ]; }}; then
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60  # until SLURM takes the job away
fi
exit "$code\""""
