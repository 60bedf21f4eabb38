"""A real SLURM cluster of two nodes: requeue, preemption and a node that dies end in the same bits."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import TwoNodes, available

from delo_llava import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.slurm,
    pytest.mark.skipif(
        not available(), reason="SLURM is not installed: python tests/distributed/slurm_cluster.py install"
    ),
]

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    nodes = TwoNodes(tmp_path_factory.mktemp("cluster"))
    nodes.start()
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to submit from: data, model, and the launch scripts as in a checkout."""
    folder = tmp_path_factory.mktemp("jobs")
    support.write_sequence(folder)
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The same run on two local ranks, never interrupted."""
    output = place / "whole"
    assert support.launch([{"words": [*words(place), f"--output={output}"]}], place, ranks=2) == [0, 0]
    return output


def words(place: Path) -> list[str]:
    given = support.words(place / "tiny.yaml", tiny_models.session("llava"), Path("unused"))
    kept = [word for word in given if not word.startswith(("--output", "--zero", "--train.epochs"))]
    return [*kept, "--zero=2", "--train.epochs=16"]


def submit(cluster: TwoNodes, place: Path, name: str, *options: str) -> int:
    """Write the job's script with the command and hand it to sbatch."""
    script = place / f"{name}.sbatch"
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH DS_ACCELERATOR=cpu"
    command = ["slurm", "--nodes", "2", "--gpus", "0", "--cpus", "1", "--time", "10", "--job-name", name]
    command += ["--warning", "60", "--setup", path, "--output", str(place / name), "--script", str(script)]
    assert cli.main([*command, "--logs", str(place / "logs"), *words(place)]) == 0
    return cluster.submit(script, *options)


def steps(output: Path) -> int:
    """Logged steps of a run, over all stages."""
    file = output / "logs" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def finish(cluster: TwoNodes, place: Path, name: str, job: int, whole: Path) -> None:
    """Wait for the job's end and compare all it made with the uninterrupted run."""
    cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"))
    log = "\n".join(file.read_text()[-3000:] for file in (place / "logs").glob(f"{name}-*"))
    assert cluster.state(job) == "COMPLETED", log
    assert (place / name / "complete.json").is_file()
    assert support.bits(place / name) == support.bits(whole)
    mine, theirs = (curves(output) for output in (place / name, whole))
    assert mine == theirs


def curves(output: Path) -> list[Any]:
    return [
        (line["stage"], line["step"], line["loss"], line["grad_norm"]) for line in support.metrics(output)
    ]


def test_two_nodes_train_and_a_requeued_job_goes_on(cluster: TwoNodes, place: Path, whole: Path) -> None:
    job = submit(cluster, place, "requeued")
    cluster.wait(lambda: steps(place / "requeued") >= 4)
    cluster.run("scontrol", "requeue", str(job))
    finish(cluster, place, "requeued", job, whole)
    assert cluster.restarts(job) == 1
    recorded = json.loads((place / "requeued" / "run.json").read_text())
    assert {stage["world"] for stage in recorded["stages"].values()} == {2}


@pytest.mark.long
def test_a_job_of_higher_priority_takes_the_nodes_and_gives_them_back(
    cluster: TwoNodes, place: Path, whole: Path
) -> None:
    job = submit(cluster, place, "preempted")
    cluster.wait(lambda: steps(place / "preempted") >= 4)
    urgent = place / "urgent.sbatch"
    urgent.write_text("#!/bin/sh\n#SBATCH --nodes=2 --cpus-per-task=2 --partition=high\nsleep 1\n")
    other = cluster.submit(urgent)
    cluster.wait(lambda: cluster.state(other) == "COMPLETED")
    log = "\n".join(file.read_text() for file in (place / "logs").glob("preempted-*"))
    assert "asked to leave by" in log, "the ranks were asked to save, and did, before the nodes were taken"
    finish(cluster, place, "preempted", job, whole)
    assert cluster.restarts(job) >= 1


@pytest.mark.long
def test_a_node_that_dies_does_not_end_the_run(cluster: TwoNodes, place: Path, whole: Path) -> None:
    job = submit(cluster, place, "node")
    cluster.wait(lambda: steps(place / "node") >= 4)
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.state(job) in ("PENDING", "REQUEUED", "FAILED", "NODE_FAIL"))
    cluster.start_node("n2")
    finish(cluster, place, "node", job, whole)
    assert cluster.restarts(job) >= 1


def test_the_marker_of_the_run_decides_and_not_the_launcher(cluster: TwoNodes, place: Path) -> None:
    """A job whose command is nothing but success fails, since no run reached its end."""
    script = place / "empty.sbatch"
    command = ["slurm", "--gpus", "0", "--cpus", "1", "--time", "10", "--job-name", "empty"]
    command += ["--output", str(place / "empty")]
    assert cli.main([*command, "--logs", str(place / "logs"), "--script", str(script), *words(place)]) == 0
    tools = place / "tools"
    tools.mkdir()
    (tools / "deepspeed").write_text("#!/bin/sh\nexit 0\n")
    (tools / "deepspeed").chmod(0o755)
    text = script.read_text().replace("set -uo pipefail", f"set -uo pipefail\nexport PATH={tools}:$PATH")
    script.write_text(text)
    job = cluster.submit(script)
    cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"))
    assert cluster.state(job) == "FAILED"
    assert "complete.json is missing" in next((place / "logs").glob("empty-*")).read_text()
