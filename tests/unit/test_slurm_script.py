"""sbatch scripts: what reaches the launcher, what goes back into the queue, and the examples' freshness.

The scripts run for real, with small stand-ins for SLURM's programs and the launcher on the path; the real
SLURM is tested in tests/distributed/test_slurm.py.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from delo_llava import cli
from delo_llava.cluster.slurm import SlurmJob, script
from delo_llava.errors import DeloError

ROOT = Path(cli.__file__).parents[1]

SRUN = """#!/usr/bin/env bash
while [ "$1" != bash ]; do echo "$1" >> srun-options; shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames"*) echo localhost ;;
  "show job"*) echo "JobId=7 JobState=${FAKE_STATE:-RUNNING} Restarts=0" ;;
  "requeue"*) echo "$*" >> requeued ;;
esac
"""
DEEPSPEED = f"""#!{sys.executable}
import json, os, sys
json.dump(dict(words=sys.argv[1:], hosts=open(sys.argv[1].split("=", 1)[1]).read(),
               address=os.environ["MASTER_ADDR"], port=os.environ["MASTER_PORT"]), open("launched.json", "w"))
exec(open("act.py").read())
"""


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a job's script; `act` is what the launcher does. Returns (exit code, folder)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("deepspeed", DEEPSPEED),
        ("sleep", "#!/bin/sh\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def go(job: SlurmJob, act: str = "", **environment: str) -> tuple[int, Path]:
        (tmp_path / "job.sbatch").write_text(script(job))
        (tmp_path / "act.py").write_text(act)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(tmp_path)}
        here = os.environ | slurm | environment | {"PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=here, check=False, timeout=60)
        return done.returncode, tmp_path

    return go


FINISHED = "import pathlib; p = pathlib.Path('out put'); p.mkdir(); (p / 'complete.json').write_text('{}')"


def test_every_word_reaches_the_launcher_as_it_was(run: Any) -> None:
    hostile = ["--data.root=/data/my set", "--note=$(touch hacked); `touch hacked` 'a' \"b\" \\ *"]
    code, folder = run(SlurmJob(hostile, Path("out put"), nodes=1, gpus=4), FINISHED)
    launched = json.loads((folder / "launched.json").read_text())
    assert code == 0 and not (folder / "hacked").exists()
    start = launched["words"].index("launch/train.py")
    assert launched["words"][start + 1 :] == [*hostile, "--output", "out put"]
    assert launched["hosts"] == "localhost slots=4\n"
    assert (launched["address"], launched["port"]) == ("localhost", "20007")
    assert "--no_ssh" in launched["words"] and "--node_rank=0" in launched["words"]


@pytest.mark.parametrize(
    ("act", "state", "code", "again"),
    [
        ("sys.exit(75)", "RUNNING", 75, True),
        ("sys.exit(75)", "CANCELLED", 75, False),
        ("sys.exit(1)", "RUNNING", 1, False),
        # Preempted: the launcher dies of TERM while the ranks save and note that they were asked to leave.
        (
            "os.mkdir('out put'); open('out put/run.json', 'w').write('{\"stopped\": {}}')\n"
            "os.kill(os.getpid(), 15)", "RUNNING", 143, True,
        ),
        ("", "RUNNING", 1, False),  # success without the run's marker
    ],
)  # fmt: skip
def test_what_goes_back_into_the_queue(run: Any, act: str, state: str, code: int, again: bool) -> None:
    done, folder = run(SlurmJob([], Path("out put")), act, FAKE_STATE=state)
    assert done == code
    assert (folder / "requeued").exists() == again


def test_an_array_runs_each_method_and_seed_in_a_folder_of_its_own(run: Any) -> None:
    job = SlurmJob(["--task_seq", "mini6"], Path("runs"), methods=["delo", "lora"], seeds=[0, 1])
    assert "#SBATCH --array=0-3" in script(job)
    found = []
    for index in range(4):
        act = "os.makedirs(sys.argv[-1]); open(sys.argv[-1] + '/complete.json', 'w')"
        code, folder = run(job, act, SLURM_ARRAY_TASK_ID=str(index))
        words = json.loads((folder / "launched.json").read_text())["words"]
        found.append(words[words.index("--method") + 1 :])
        assert code == 0
    assert found == [
        [method, "--seed", str(seed), "--output", f"runs/{method}-s{seed}"]
        for method in ("delo", "lora")
        for seed in (0, 1)
    ]


def test_options_of_slurm_and_containers(run: Any) -> None:
    job = SlurmJob(
        [], Path("out put"), partition="gpu", account="lab", container="image.sqsh", mounts="/data:/data",
        extra=["--mail-type=END"], setup=["echo ready > setup"],
    )  # fmt: skip
    code, folder = run(job, FINISHED)
    text = (folder / "job.sbatch").read_text()
    for line in ("partition=gpu", "account=lab", "mail-type=END", "requeue", "signal=B:USR1@300"):
        assert f"#SBATCH --{line}\n" in text
    assert code == 0 and (folder / "setup").read_text() == "ready\n"
    options = (folder / "srun-options").read_text().split()
    assert "--container-image=image.sqsh" in options and "--container-mounts=/data:/data" in options


@pytest.mark.parametrize(
    "job",
    [
        SlurmJob([], Path("x"), nodes=0),
        SlurmJob([], Path("x"), gpus=-1),
        SlurmJob([], Path("x"), methods=["delo"]),
        SlurmJob([], Path("x"), name="a\n#SBATCH --wrap=evil"),
    ],
)
def test_what_makes_no_job_is_refused(job: SlurmJob) -> None:
    with pytest.raises(DeloError):
        script(job)


def test_mistakes_are_told_before_anything_waits_in_a_queue(tmp_path: Path, capsys: Any) -> None:
    for words in (["--train.micro_batsh=1"], ["--task_seq", "coin5"], ["--train.micro_batch=7"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["slurm", "--script", str(tmp_path / "job.sbatch"), *words])
    assert not list(tmp_path.iterdir())
    assert "did you mean" in capsys.readouterr().err


def test_submitting_without_slurm_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["slurm", "--gpus", "2", "--task_seq", "mini6", "--submit"])
    assert "sbatch delo-llava.sbatch" in capsys.readouterr().err
    assert (tmp_path / "delo-llava.sbatch").is_file() and (tmp_path / "logs").is_dir()


@pytest.mark.parametrize(
    "example", sorted((ROOT / "launch" / "slurm").glob("*.sbatch")), ids=lambda p: p.stem
)
def test_examples_are_what_their_command_writes(example: Path, capsys: Any) -> None:
    """The second line of an example is the command that wrote it."""
    first, command, *rest = example.read_text().splitlines(keepends=True)
    words = shlex.split(command.removeprefix("# Written by:"))
    assert words[0] == "delo-llava"
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out == "".join([first, *rest])
