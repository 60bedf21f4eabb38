"""Two "nodes" on loopback without SLURM: torchrun and deepspeed, each started once a node, as by hand."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny_models
import training_support as support

from delo_llava import cli
from delo_llava.engines.signals import EXIT_CODE

pytestmark = [pytest.mark.distributed, pytest.mark.long]

TRAIN = Path(cli.__file__).parents[1] / "launch" / "train.py"
BIN = Path(sys.executable).parent
#: Two names of this machine, so that a host file can hold two nodes.
HOSTS = ("127.0.0.1", "localhost")
SECONDS = 240.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    support.write_sequence(folder)
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return folder


@pytest.fixture(scope="module")
def local(place: Path) -> Path:
    """The run on two ranks of one node."""
    assert support.launch([{"words": words(place, "local")}], place, ranks=2) == [0, 0]
    return place / "local"


def words(place: Path, name: str) -> list[str]:
    return support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, "--zero=2", "--train.epochs=8"
    )


def torchrun(node: int, port: int, place: Path) -> list[str]:
    group = ["--nnodes=2", f"--node_rank={node}", "--nproc-per-node=1"]
    return [str(BIN / "torchrun"), *group, f"--master_addr={HOSTS[0]}", f"--master_port={port}"]


def deepspeed(node: int, port: int, place: Path) -> list[str]:
    group = [f"--hostfile={place / 'hosts'}", "--no_ssh", f"--node_rank={node}"]
    return [str(BIN / "deepspeed"), *group, f"--master_addr={HOSTS[0]}", f"--master_port={port}"]


def start(launcher: object, place: Path, name: str) -> list[subprocess.Popen[bytes]]:
    """Start both nodes with the same words; their output goes to `<name>-<node>.log`."""
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    nodes = []
    for node in range(2):
        command = [*launcher(node, port, place), str(TRAIN), *words(place, name)]  # type: ignore[operator]
        with (place / f"{name}-{node}.log").open("ab") as log:
            nodes.append(subprocess.Popen(command, env=env, cwd=place, stdout=log, stderr=log))
    return nodes


def leave(nodes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of both nodes; nothing that was started outlives the test."""
    try:
        return [node.wait(SECONDS) for node in nodes]
    finally:
        for node in nodes:
            for pid in [*descendants(node.pid), node.pid]:
                if Path(f"/proc/{pid}").exists() and node.poll() is None:
                    os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> Iterator[int]:
    """Processes started by a process and by those, the youngest first."""
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            yield from descendants(child)
            yield child


def rank_of(node: subprocess.Popen[bytes]) -> int:
    """The one process of a node that trains."""
    ranks = [
        pid
        for pid in descendants(node.pid)
        if (line := Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        and str(TRAIN).encode() in line[:4]
    ]
    return ranks[0]


def log_of(place: Path, name: str) -> str:
    return "\n".join((place / f"{name}-{node}.log").read_text()[-3000:] for node in range(2))


def same_run(one: Path, other: Path) -> None:
    assert support.bits(one) == support.bits(other)
    assert [(e["stage"], e["step"], e["loss"], e["grad_norm"]) for e in support.metrics(one)] == [
        (e["stage"], e["step"], e["loss"], e["grad_norm"]) for e in support.metrics(other)
    ]


def test_torchrun_on_two_nodes_gives_the_bits_of_one(place: Path, local: Path) -> None:
    assert leave(start(torchrun, place, "torchrun")) == [0, 0], log_of(place, "torchrun")
    assert (place / "torchrun" / "complete.json").is_file()
    same_run(place / "torchrun", local)


def test_both_nodes_leave_with_one_and_the_same_commands_finish(place: Path, local: Path) -> None:
    """TERM to the rank of the second node; deepspeed's launchers hand the code on."""
    output = place / "deepspeed"
    nodes = start(deepspeed, place, "deepspeed")
    log, ends = output / "logs" / "metrics.jsonl", time.monotonic() + SECONDS
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < ends and not any(node.poll() for node in nodes), log_of(place, "deepspeed")
        time.sleep(0.1)
    os.kill(rank_of(nodes[1]), signal.SIGTERM)
    assert leave(nodes) == [EXIT_CODE, EXIT_CODE], log_of(place, "deepspeed")
    assert not (output / "complete.json").exists(), "it left before the end"
    assert leave(start(deepspeed, place, "deepspeed")) == [0, 0], log_of(place, "deepspeed")
    assert (output / "complete.json").is_file()
    same_run(output, local)
