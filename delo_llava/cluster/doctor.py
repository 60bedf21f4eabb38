"""Is this machine fit to run? One finding for each thing that went wrong for somebody before."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]

#: Room that a run and its caches take, and what is too little to start with.
ROOM_GIB, LEAST_GIB = 20, 2
#: Open files: every worker, rank and memory-mapped table holds some.
OPEN_FILES = 4096
LOCK_FILE = "requirements.lock"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do when it is not well."""

    name: str
    level: Level
    text: str
    remedy: str = ""


def findings(folder: Path, lock: Path | None = None, network: bool = True) -> Iterator[Finding]:
    """Every check, in the order a person would look.

    Args:
        folder: where runs will be written.
        lock: the lock file; by default the one of the checkout.
        network: also open a process group of two processes.
    """
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        _python,
        lambda: _versions(lock or _own_lock()),
        _device,
        _four_bit,
        _attention,
        _deepspeed,
        _launcher,
        lambda: _disk(folder),
        _limits,
        *([_rendezvous] if network else []),
    )
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    level: Level = "ok" if sys.version_info >= (3, 11) else "error"
    yield Finding("python", level, found, "" if level == "ok" else "install Python 3.11 or newer")


def _own_lock() -> Path:
    return Path(__file__).resolve().parents[2] / LOCK_FILE


def locked_versions(lock: Path) -> dict[str, str]:
    """Package -> exact version, as the lock file pins them."""
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(pins)


def _needed() -> set[str]:
    """Names, in small letters with dashes, of the packages that this one needs without any extra."""
    try:
        lines = requires("delo-llava") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return set()
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if "extra ==" not in line)
    return {_dashed(name[0]) for name in names if name}


def _dashed(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _versions(lock: Path) -> Iterator[Finding]:
    if not lock.is_file():
        yield Finding(
            "versions", "warning", "no lock file beside the package", "install from a checkout to compare"
        )
        return
    absent, other, needed = [], [], _needed()
    for name, pinned in locked_versions(lock).items():
        try:
            here = version(name).partition("+")[0]
        except PackageNotFoundError:
            if _dashed(name) in needed:
                absent.append(name)
            continue
        if here != pinned:
            other.append(f"{name} {here} (locked {pinned})")
    remedy = f"pip install -c {LOCK_FILE} -e ."
    if absent:
        yield Finding("versions", "warning", f"not installed: {', '.join(absent)}", remedy)
    if other:
        yield Finding("versions", "warning", f"not the tested ones: {', '.join(other)}", remedy)
    if not absent and not other:
        yield Finding("versions", "ok", "all as locked")


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver is not None:
            yield Finding(
                "device", "error", "there is an NVIDIA driver, but torch sees no GPU",
                "install a CUDA build of torch that fits the driver (nvidia-smi shows its version)",
            )  # fmt: skip
            return
        yield Finding("device", "ok", f"no GPU; {os.cpu_count()} CPU cores, fp32")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, gib = torch.cuda.get_device_name(index), total / 2**30
        text = f"cuda:{index} {name}, {free / 2**30:.1f} of {gib:.1f} GiB free"
        if free < 0.8 * total:
            yield Finding("device", "warning", text, "another process holds memory: see nvidia-smi")
        else:
            yield Finding("device", "ok", text)
    if not torch.cuda.is_bf16_supported():
        yield Finding("device", "error", "this GPU has no bf16", "use --dtype float32, or a newer GPU")


def _four_bit() -> Iterator[Finding]:
    """Quantise and dequantise a matrix: NF4's largest relative error on normal weights is well known."""
    if find_spec("bitsandbytes") is None:
        yield Finding(
            "4 bit", "error", "bitsandbytes is not installed", "pip install bitsandbytes, or --quant none"
        )
        return
    import torch

    functional: Any = import_module("delo_llava.backbones._quant")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        error = functional.round_trip_error(place)
    except (RuntimeError, OSError) as fault:
        yield Finding("4 bit", "error", f"NF4 does not run on {place}: {fault}", "reinstall bitsandbytes")
        return
    level: Level = "ok" if error < 0.12 else "error"
    yield Finding("4 bit", level, f"NF4 on {place}, relative error {error:.3f} (about 0.09 is right)")


def _attention() -> Iterator[Finding]:
    import torch

    if find_spec("flash_attn") is None:
        yield Finding("attention", "ok", "sdpa and eager; flash-attn is not installed (optional, CUDA only)")
        return
    if not torch.cuda.is_available():
        yield Finding(
            "attention", "warning", "flash-attn is installed, but there is no GPU", "use --attn sdpa"
        )
        return
    try:
        import_module("flash_attn")
    except (ImportError, OSError) as fault:
        yield Finding(
            "attention", "error", f"flash-attn cannot be imported: {fault}",
            "build it for this torch: pip install --no-build-isolation --force-reinstall flash-attn",
        )  # fmt: skip
        return
    yield Finding("attention", "ok", "flash-attn, sdpa and eager")


def stale_locks(folder: Path) -> list[Path]:
    """Lock files that a killed build of a torch extension left: the next build waits for them for ever."""
    return sorted(folder.rglob("lock")) if folder.is_dir() else []


def extensions_folder() -> Path:
    """Where torch builds its extensions, DeepSpeed's ops among them."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def _deepspeed() -> Iterator[Finding]:
    if find_spec("deepspeed") is None:
        yield Finding(
            "deepspeed", "error", "DeepSpeed is not installed", "pip install deepspeed, or --zero none"
        )
        return
    locks = stale_locks(extensions_folder())
    if locks:
        names = ", ".join(str(lock) for lock in locks)
        yield Finding(
            "deepspeed", "error", f"an unfinished build of an op is locked: {names}",
            "if nothing is being built now, remove these files; every later run would wait for them silently",
        )  # fmt: skip
    yield Finding("deepspeed", "ok", f"{version('deepspeed')}; no op needs to be compiled for our stages")


def _launcher() -> Iterator[Finding]:
    beside = Path(sys.executable).with_name("deepspeed")
    found = beside if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        yield Finding(
            "launcher", "error", "the command `deepspeed` is not on the path", "activate the environment"
        )
        return
    other = shutil.which("deepspeed")
    if other is not None and beside.is_file() and Path(other).resolve() != beside.resolve():
        yield Finding(
            "launcher", "warning", f"`deepspeed` means {other}, not this environment's {beside}",
            "activate the environment, or call it by its path",
        )  # fmt: skip
        return
    slurm = "; SLURM's srun and sbatch are here" if shutil.which("sbatch") and shutil.which("srun") else ""
    yield Finding("launcher", "ok", f"{found}{slurm}")


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", "error", f"{there} cannot be written", "give --folder a place with rights")
        return
    free = shutil.disk_usage(there).free / 2**30
    level: Level = "ok" if free >= ROOM_GIB else "warning" if free >= LEAST_GIB else "error"
    remedy = "" if level == "ok" else "make room, or write to another disk with --output"
    yield Finding("disk", level, f"{free:.1f} GiB free for {folder}", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / 2**30) < 1:
        yield Finding(
            "disk", "warning", f"/dev/shm holds {size:.2f} GiB only",
            "NCCL and data workers need more: in a container, --shm-size=8g or --ipc=host",
        )  # fmt: skip


def _limits() -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        yield Finding("limits", "warning", f"{soft} open files allowed", f"ulimit -n {min(hard, 65536)}")
    else:
        yield Finding("limits", "ok", f"{soft} open files allowed")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        yield Finding(
            "limits", "warning", "InfiniBand is here, but locked memory is limited",
            "ulimit -l unlimited (in SLURM: PropagateResourceLimitsExcept=MEMLOCK)",
        )  # fmt: skip


def _rendezvous() -> Iterator[Finding]:
    """Two processes meet by gloo, on the address that a job would use, and add up a number."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding(
            "network", "warning", f"this host's name {name} does not resolve",
            "set MASTER_ADDR to an address, or add the name to /etc/hosts",
        )  # fmt: skip
        address = "127.0.0.1"
    if meets(address):
        yield Finding("network", "ok", f"two processes met at {address} (gloo)")
        return
    remedy = (
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that the nodes share (ip -br addr)"
    )
    if address != "127.0.0.1" and meets("127.0.0.1"):
        text = f"processes meet at 127.0.0.1 but not at {address}: one node works, several may not"
        yield Finding("network", "warning", text, remedy)
    else:
        yield Finding("network", "error", f"two processes did not meet at {address}", remedy)


def meets(address: str, seconds: float = 60.0) -> bool:
    """Whether two processes can form a group at `address`."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        port = probe.getsockname()[1]
    here = os.environ | {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "delo_llava.cluster.meet", str(seconds)]
    children = [subprocess.Popen(command, env=here | {"RANK": str(rank)}, stderr=subprocess.DEVNULL)
                for rank in range(2)]  # fmt: skip
    try:
        return [child.wait(seconds) for child in children] == [0, 0]
    except subprocess.TimeoutExpired:
        return False
    finally:
        for child in children:
            child.kill()
            child.wait()
