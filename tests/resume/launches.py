"""A start of the training command as forks of this process, which can be killed as a whole."""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil


class Launch:
    """One start of the command: the processes of all ranks, in a process group of their own."""

    def __init__(self, starts: list[Callable[[], int]], log: Path) -> None:
        self.log, self.pids = log, list[int]()
        self.codes: dict[int, int] = {}
        gc.collect()
        for start in starts:
            self.pids.append(_fork(start, log, self.pids[0] if self.pids else 0))

    def running(self) -> bool:
        """Whether any rank is; notes the exit codes of the others."""
        for pid in set(self.pids) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def kill(self, late: float = 0.0, first: int = 0) -> None:
        """SIGKILL to the whole group; with `late`, one rank so many seconds before the others."""
        started = [child for pid in self.pids for child in _descendants(pid)]
        if late:
            _kill(self.pids[first % len(self.pids)])
            time.sleep(late)
        with suppress(ProcessLookupError):
            os.killpg(self.pids[0], signal.SIGKILL)
        for process in started:  # a launcher's ranks, should they have left the group
            _kill(process.pid)
        while self.running():
            time.sleep(0.005)
        psutil.wait_procs(started, timeout=30)

    def end_of_log(self) -> str:
        """What it said last."""
        return self.log.read_text(errors="replace")[-4000:]


def _fork(start: Callable[[], int], log: Path, group: int) -> int:
    """A child that runs `start` with its output in `log`, in the process group `group` (0: its own)."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with suppress(PermissionError, ProcessLookupError):  # the child has done it, or is gone
            os.setpgid(pid, group)
        return pid
    os.setpgid(0, group)
    _run_child(start, log)


def _run_child(start: Callable[[], int], log: Path) -> NoReturn:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = start()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:  # noqa: BLE001 - the child must never go on in its parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
