"""How far a long command is: a live bar with remaining time on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

#: Seconds between two lines where there is no terminal.
LINE_EVERY = 15.0


class Advance(Protocol):
    """Tells that `count` more are done."""

    def __call__(self, count: int = 1) -> None:
        """Count on."""
        ...


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Advance]:
    """Show progress on standard error while the body calls what it is given.

    Args:
        what: what is being done.
        total: how much there is to do, where that is known.
    """
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        yield _Lines(what, total)


class _Lines:
    """A line every `LINE_EVERY` seconds; short work says nothing."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.told = time.monotonic()

    def __call__(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told < LINE_EVERY:
            return
        self.told = now
        rate = self.done / (now - self.began)
        of = ""
        if self.total is not None:
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
            of = f" of {self.total:,}, {left} left"
        sys.stderr.write(f"{self.what}: {self.done:,}{of}, {rate:,.0f}/s\n")


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Advance]:
    """A bar of rich."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1: bar.advance(task, count)
