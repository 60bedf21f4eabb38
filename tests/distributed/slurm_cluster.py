"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd on loopback.

    python tests/distributed/slurm_cluster.py install        # Debian packages; needs root
    python tests/distributed/slurm_cluster.py start FOLDER   # prints the SLURM_CONF to use
    python tests/distributed/slurm_cluster.py stop FOLDER

Everything it writes lies in FOLDER; nothing of a SLURM that is installed for real is touched.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
NODES = ("n1", "n2")
DAEMONS = ("slurmd-n1", "slurmd-n2", "slurmctld", "munged")

CONF = """\
ClusterName=twonodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,preempt_send_user_signal
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=10
MinJobAge=600
InactiveLimit=0
SlurmdTimeout={timeout}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 Default=NO MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def available() -> bool:
    """Whether the programs are installed and may be started (slurmd wants root)."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return os.geteuid() == 0 and all(shutil.which(program, path=path) for program in PROGRAMS)


class TwoNodes:
    """The cluster in `folder`; `slurmd_timeout` is how long a silent node counts as alive."""

    def __init__(self, folder: Path, slurmd_timeout: int = 20) -> None:
        self.folder, self.timeout = folder, slurmd_timeout
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        first = _free_ports(len(NODES) + 1)
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for port, node in enumerate(NODES, start=first + 1)
        )
        text = CONF.format(host=host, port=first, folder=self.folder, timeout=self.timeout, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        options = {
            "key-file": key,
            "socket": self.folder / "munge.sock",
            "pid-file": self.folder / "munged.pid",
        }
        options |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munge.seed"}
        self.run("munged", *(f"--{name}={value}" for name, value in options.items()), "--force")
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(
            lambda: self.run("sinfo", "-hN", "-t", "idle", "-p", "main", "-o", "%N").split() == [*NODES]
        )

    def start_node(self, node: str) -> None:
        """Start (again) the daemon of one node."""
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything it runs, as a machine that loses its power."""
        pid = int((self.folder / f"slurmd-{node}.pid").read_text())
        for child in [*_steps_of(self.folder / f"spool-{node}"), pid]:
            _kill_tree(child)

    def stop(self) -> None:
        """Stop exactly the daemons that were started here."""
        self.run("scancel", "--user=root", check=False)
        for name in DAEMONS:
            file = self.folder / f"{name}.pid"
            if file.is_file() and (text := file.read_text().strip()):
                _kill_tree(int(text), signal.SIGTERM)

    def run(self, *words: str, check: bool = True) -> str:
        """A SLURM command's output."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    def submit(self, script: Path, *options: str) -> int:
        """Hand a script to sbatch from its own folder; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)], env=self.env, cwd=script.parent,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout.split(";")[0])

    def state(self, job: int) -> str:
        """The job's state as SLURM names it."""
        words = self.run("scontrol", "show", "job", str(job), "-o").split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def restarts(self, job: int) -> int:
        """How often the job was put back into the queue."""
        words = self.run("scontrol", "show", "job", str(job), "-o").split()
        return int(next(word.partition("=")[2] for word in words if word.startswith("Restarts=")))

    def wait(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        """Wait until `condition` holds.

        Raises:
            TimeoutError: with the ends of all logs.
        """
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                logs = {log.name: log.read_text()[-1500:] for log in self.folder.glob("*.log")}
                raise TimeoutError(f"{logs}")
            time.sleep(0.3)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody uses."""
    for first in range(17100, 19000, 10):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, probe in enumerate(sockets):
                probe.bind(("127.0.0.1", first + i))
            return first
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise OSError("no free ports")


def _steps_of(spool: Path) -> list[int]:
    """slurmstepd processes of one node, found by the sockets in its spool folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "comm").is_file():
            try:
                if (entry / "comm").read_text().strip() == "slurmstepd" and _opens(entry, spool):
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def _opens(process: Path, spool: Path) -> bool:
    return any(str(os.readlink(link)).startswith(str(spool)) for link in (process / "fd").iterdir())


def _kill_tree(pid: int, number: int = signal.SIGKILL) -> None:
    """Kill a process and what it started."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    if number == signal.SIGKILL:
        for child in children.split():
            _kill_tree(int(child), number)


def main(words: list[str]) -> int:
    """`install`, `start FOLDER` or `stop FOLDER`."""
    if words == ["install"]:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        return subprocess.run(
            command, check=False, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        ).returncode
    cluster = TwoNodes(Path(words[1]).absolute())
    if words[0] == "start":
        cluster.start()
        sys.stdout.write(f"export SLURM_CONF={cluster.env['SLURM_CONF']}\n")
    else:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
