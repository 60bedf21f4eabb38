"""One writer for a run's folder: `run.lock` says who trains in it, and refuses a second process.

The kernel's lock on the file (flock) ends with its process, however that ends. Where a file system has none,
or keeps it to one host, the owner's heartbeat (the file's time, set every `BEAT` seconds) decides.
"""

import fcntl
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delo_llava.errors import DeloError

FILE = "run.lock"
#: Seconds between two heartbeats, and after which an owner on another host counts as dead.
BEAT, DEAD_AFTER = 20.0, 120.0


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Hold the folder's lock for the block; gives a sentence about a dead owner it was taken from, or "".

    Raises:
        DeloError: another process trains in this folder (told with who and since when), or the folder cannot
            be written.
    """
    file = folder / FILE
    handle = _open(file)
    try:
        owner, supported = _owner(handle), _try_lock(handle)
        if supported is not True and (fault := _alive(owner, file, locked=supported is False)):
            raise _held(folder, owner, file, fault)
        if supported is True and _elsewhere(owner, file):
            raise _held(folder, owner, file, "its heartbeat is fresh")
        taken = _told(owner, file) if owner else ""
        me = _myself()
        _write(handle, me)
        beating = threading.Event()
        heart = threading.Thread(target=_beat, args=(file, beating), daemon=True, name="run.lock")
        heart.start()
        try:
            yield taken
        finally:
            beating.set()
            heart.join()
            if _owner(handle).get("id") == me["id"]:  # or it was taken over, and is another's entry now
                _write(handle, {})
    finally:
        os.close(handle)


def owner_of(folder: Path) -> dict[str, Any]:
    """Who trains in the folder, as far as its file tells: host, pid, user, since, slurm_job; or empty."""
    try:
        found: Any = json.loads((folder / FILE).read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _open(file: Path) -> int:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        fix = "give rights there, or another --output"
        raise DeloError(
            f"The run's folder cannot be written: {error.strerror}.", given=file, fix=fix
        ) from error


def _try_lock(handle: int) -> bool | None:
    """Whether the kernel gave the lock; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(handle: int) -> dict[str, Any]:
    """What the file says of its owner; a line that a kill cut short says nothing."""
    try:
        found: Any = json.loads(os.pread(handle, 4096, 0).decode() or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(handle: int, content: Mapping[str, Any]) -> None:
    data = json.dumps(content).encode()
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.fsync(handle)


def _myself() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "user": _user(),
        "since": time.time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _boot() -> str:
    """An id of this start of the machine, so that a number of a process before it means nothing."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""


def _alive(owner: Mapping[str, Any], file: Path, locked: bool) -> str:
    """Why the owner counts as alive though the lock was not given; empty if it counts as dead."""
    if not owner:
        return "it starts just now" if locked else ""
    if _same_job(owner):
        return ""
    if owner.get("host") == socket.gethostname():
        return "its process runs" if owner.get("boot") == _boot() and _runs(owner.get("pid")) else ""
    return "its heartbeat is fresh" if _silence(file) < DEAD_AFTER else ""


def _elsewhere(owner: Mapping[str, Any], file: Path) -> bool:
    """Whether a live owner sits on a host that this host's lock says nothing of."""
    other = bool(owner) and owner.get("host") != socket.gethostname()
    return other and not _same_job(owner) and _silence(file) < DEAD_AFTER


def _same_job(owner: Mapping[str, Any]) -> bool:
    """An earlier start of this job, which SLURM ended before it put the job back into the queue."""
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is None or owner.get("slurm_job") != job:
        return False
    return int(owner.get("slurm_restart") or 0) < int(restart or 0)


def _runs(pid: object) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _silence(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def _beat(file: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            os.utime(file)
        except OSError:
            continue  # a file system that is away for a moment; the lock itself does not depend on it


def _who(owner: Mapping[str, Any]) -> str:
    job = f", SLURM job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    return f"process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}{job}"


def _age(owner: Mapping[str, Any]) -> str:
    seconds = max(0, round(time.time() - float(owner.get("since", time.time()))))
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _held(folder: Path, owner: Mapping[str, Any], file: Path, why: str) -> DeloError:
    who = f"{_who(owner)}, for {_age(owner)} ({why})" if owner else why
    return DeloError(
        "Another process trains in this folder.",
        given=f"{folder}: {who}",
        fix=f"wait for it, stop it, or choose another --output; if it is surely dead, remove {file}",
    )


def _told(owner: Mapping[str, Any], file: Path) -> str:
    return f"taking the folder over from {_who(owner)}, which ended without a word after {_age(owner)}"
