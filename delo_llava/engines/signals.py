"""Signals that ask a run to leave: TERM, USR1 and INT set a flag, which the run looks at where it can save.

Imports nothing slow: handlers must stand before torch is loaded, or a signal during start-up kills the
process without a word. How the ranks of a run agree to leave is in `ranks.py`.
"""

import os
import signal
import sys
import threading
from types import FrameType

#: EX_TEMPFAIL of sysexits.h: start the same command again and it goes on (what SLURM's script requeues on).
EXIT_CODE = 75

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_received: list[str] = []


class Preempted(SystemExit):
    """The run was asked to leave and what it can save is saved; uncaught, it ends the process with code 75.

    Args:
        reason: the signal, or that another rank got one.
        where: what was being done.
        together: every rank raises it at the same place, so they can still talk.
    """

    def __init__(self, reason: str, where: str, together: bool = True) -> None:
        super().__init__(EXIT_CODE)
        self.reason, self.where, self.together = reason, where, together

    def __str__(self) -> str:
        return f"asked to leave by {self.reason} while {self.where}; the same command goes on from there"


def install() -> None:
    """Install the handlers, once; a no-op outside the main thread, where Python allows none."""
    if threading.current_thread() is threading.main_thread():
        for number in WATCHED:
            signal.signal(number, _note)


def requested() -> str | None:
    """The name of the first signal this process got, or None."""
    return _received[0] if _received else None


def clear() -> None:
    """Forget what was received (for tests, and for callers that go on)."""
    _received.clear()


def leave_if_requested(where: str) -> None:
    """For a process that has no peers to agree with, or has not met them yet.

    Raises:
        Preempted: a signal was received.
    """
    reason = requested()
    if reason is not None:
        raise Preempted(reason, where)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGINT and name in _received:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if name not in _received:
        _received.append(name)
    if len(_received) == 1:
        hint = " (once more kills at once)" if number == signal.SIGINT else ""
        # The only write that is safe in a handler: a buffered one could be interrupted by itself.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{name}: leaving soon{hint}\n".encode())
