"""How a command ends: every exception that reaches the top becomes a sentence and an exit code."""

import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from delo_llava.engines import signals
from delo_llava.engines.launched import speaks
from delo_llava.errors import DeloError, printable

#: Seconds that other ranks leave rank 0 to tell a fault that all of them see.
TELL_FIRST = 3.0
#: Exit codes of shells for a process that SIGINT or SIGPIPE ended.
INTERRUPTED, BROKEN_PIPE = 130, 141
#: Exit code where something is wrong that nobody foresaw.
UNFORESEEN = 1
GOES_ON = "the same command goes on where it was"
PORT_TAKEN = (
    "another job on this machine has the port: `deepspeed --master_port 29501 …` names another one "
    "(torchrun: --master-port)"
)
#: errno -> what helps.
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EACCES: "change its rights, or name another place",
    errno.EPERM: "change its rights, or name another place",
    errno.EROFS: "nothing can be written there: name another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file: check it",
    errno.EISDIR: "this is a folder: name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "let a process open more files: ulimit -n 65536",
    errno.ENFILE: "the machine has too many open files: end some of its processes",
    errno.ENOMEM: "end other processes, or take less at once (a smaller micro-batch, fewer workers)",
    errno.EADDRINUSE: PORT_TAKEN,
    errno.EIO: "the disk or network drive does not answer: look at it, then try again",
    errno.ESTALE: "the network drive has changed under the process: try again",
}
#: What torch and the launcher say when the processes' meeting place is taken, or a peer is gone.
TAKEN = ("eaddrinuse", "address already in use")
GONE = ("Connection closed by peer", "Connection reset by peer", "recvBytes", "Broken pipe", "aborted due to")


def told(command: Callable[..., int], *arguments: object, goes_on: bool = False) -> int:
    """Run a command; whatever ends it is told in a sentence, by rank 0 alone if all ranks see it.

    Args:
        goes_on: started again with the same words, the command goes on where it was; said unless it ends by
            a `DeloError`, which brings its own remedy.

    Returns:
        the command's own exit code; 75 if a signal asked it to leave and the same command will go on.

    Raises:
        SystemExit: with the exit code of a `DeloError`; 130 for Ctrl-C; 141 if whoever reads its output left;
            1 for what nobody foresaw, with a traceback.
    """
    plain_streams()
    quiet_libraries()
    try:
        code = command(*arguments)
        sys.stdout.flush()
        return code
    except signals.Preempted as asked:
        if speaks():
            sys.stderr.write(f"{asked}\n")
        return signals.EXIT_CODE
    except KeyboardInterrupt:
        _end("interrupted", goes_on, INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads on: neither is there more to say, nor may the interpreter try at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None
    except DeloError as error:
        if not speaks():
            # Rank 0's exit ends this rank too: only a fault of this rank alone gets past.
            time.sleep(TELL_FIRST)
            if error.everywhere:
                raise SystemExit(error.exit_code) from error
        _end(f"error: {error.render()}", False, error.exit_code)
    except Exception as error:  # noqa: BLE001 - this is the last one who can say something
        known = as_known(error)
        if known is not None:
            _end(f"error: {known.render()}", goes_on, known.exit_code)
        traceback.print_exc()
        text = (
            f"error: {type(error).__name__}: {error}\n  This was not foreseen: please report it as it stands."
        )
        _end(text, goes_on, UNFORESEEN)


def as_known(error: Exception) -> DeloError | None:
    """What an exception of the system or of torch's process group says to a user; None for any other."""
    text = str(error)
    if any(word in text.lower() for word in TAKEN):
        return DeloError(
            "The port where the processes meet is taken", given=_first_line(text), fix=PORT_TAKEN
        )
    if isinstance(error, OSError):
        return system_refused(error)
    if isinstance(error, RuntimeError) and any(word in text for word in GONE):
        return DeloError(
            "Another rank of this run has ended while this one waited for it",
            given=_first_line(text),
            fix="its own words stand above; if there are none the system killed it (often for memory)",
        )
    if isinstance(error, UnicodeDecodeError):
        return DeloError(
            "A file is not UTF-8",
            given=f"byte {error.start}: {error.reason}",
            fix="convert it: iconv -t utf-8",
        )
    return None


def system_refused(error: OSError) -> DeloError:
    """An error of the operating system: what it was about, how much room there is, what helps."""
    about = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is not None:
        about += f" ({_free(Path(os.fsdecode(error.filename)))})"
    reason = error.strerror or _first_line(str(error)) or type(error).__name__
    return DeloError(f"The system refused: {reason}", given=about or None, fix=REMEDIES.get(error.errno or 0))


def plain_streams() -> None:
    """Write what an output cannot show (a terminal or log in ASCII) as `\\u2713` instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Leave out what libraries say to their own developers: that names will go which PEFT calls in
    transformers and DeepSpeed in torch, and that bitsandbytes would fetch a kernel from a hub (we never fetch
    code at run time).
    """
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|torch\.distributed)\."
    )
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _end(text: str, goes_on: bool, code: int) -> NoReturn:
    """Say the last words and leave."""
    more = f"\n  {GOES_ON}" if goes_on else ""
    sys.stderr.write(f"{printable(text)}{more}\n")
    raise SystemExit(code)


def _free(path: Path) -> str:
    """Room on the disk of a path that need not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return f"{found.f_bavail * found.f_frsize / 2**20:,.0f} MiB free"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
