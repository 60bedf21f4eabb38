"""Faults that the ranks of a run cannot agree on: one rank fails or stays away while the others wait for it.

A rank that fails tells it on the process group's store, and a thread of every rank looks there; it also tells
where its rank stands (what it does, and the last collective that it began), and when nothing has moved for
too long it says which rank and which collective the others wait for, and ends the process: the main thread,
which hangs
    inside
the collective, cannot.
"""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from delo_llava.engines.ranks import PATIENCE, Ranks
from delo_llava.errors import DeloError, printable

#: Keys of the store: the first fault, and where each rank stands.
FAULT, PLACE = "delo_llava/{}/fault", "delo_llava/{}/place/{}"
#: Seconds between two looks, and that a rank which fails gets to tell it by itself.
LOOK, GRACE = 1.0, 10.0
EXIT_CODE = 1


@dataclass
class Watchdog:
    """One rank's look-out while a stage is trained.

    Args:
        patience: seconds without any progress of this rank after which the run is given up.
        block: names this block of training in the store; the same on every rank.
    """

    ranks: Ranks
    patience: float
    block: str
    phase: str = "starting"
    _moved: float = field(default_factory=time.monotonic)
    _seen: tuple[str, str] = ("", "")
    _over: threading.Event = field(default_factory=threading.Event)

    def at(self, phase: str) -> None:
        """What this rank begins to do."""
        self.phase = phase

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails; the first fault of all counts."""
        text = str(error) if isinstance(error, DeloError) else f"{type(error).__name__}: {error}"
        mine = json.dumps({"rank": self.ranks.rank, "phase": self.phase, "text": text})
        _store().compare_set(FAULT.format(self.block), "", mine)

    def told(self) -> dict[str, Any] | None:
        """The first fault that any rank told."""
        store, key = _store(), FAULT.format(self.block)
        text = store.get(key).decode() if store.check([key]) else ""
        return json.loads(text) if text else None

    def watch(self) -> None:
        """The thread: until the stage is over, look once a second."""
        try:
            self._watch()
        except RuntimeError as error:  # the store is where the first rank is, and goes with it
            first = str(error).partition("\n")[0]
            self._give_up(f"rank 0 has left while rank {self.ranks.rank} was {self.phase} ({first})")

    def _watch(self) -> None:
        store = _store()
        while not self._over.wait(LOOK):
            now = self.phase, last_collective()
            if now != self._seen:
                self._seen, self._moved = now, time.monotonic()
                store.set(PLACE.format(self.block, self.ranks.rank), f"{now[0]}: {now[1]}")
            still = time.monotonic() - self._moved
            if (fault := self.told()) and fault["rank"] != self.ranks.rank and still > GRACE:
                self._give_up(fault_text(fault))
            if still > self.patience:
                self._give_up(self._stuck(still))

    def stop(self) -> None:
        """The stage is over."""
        self._over.set()

    def _stuck(self, still: float) -> str:
        store, lines = _store(), []
        for rank in range(self.ranks.world):
            key = PLACE.format(self.block, rank)
            lines.append(f"  rank {rank}: {store.get(key).decode() if store.check([key]) else 'not begun'}")
        return "\n".join(
            [
                f"rank {self.ranks.rank} has waited for {still:.0f} s. What each rank does:",
                *lines,
                "The others wait for the rank whose number is lowest, or whose collective is another.",
            ]
        )

    def _give_up(self, text: str) -> None:
        """End this process, from a thread: the main one hangs where no exception reaches it."""
        if self._over.is_set():
            return
        sys.stderr.write(f"error: {printable(text)}\n  the same command goes on from the last checkpoint\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)


@contextmanager
def watched(ranks: Ranks, patience: float) -> Iterator[Callable[[str], None]]:
    """A block of training: collectives have a short limit, a fault of one rank is told on all, and a rank
    that is waited for is named. What is yielded is told what this rank begins to do.

    Raises:
        DeloError: on the ranks that see their peers go, what the failing one told.
    """
    if ranks.world == 1:
        yield lambda phase: None
        return
    dog = Watchdog(ranks, patience, ranks.same(uuid.uuid4().hex[:8]))
    thread = threading.Thread(target=dog.watch, name="watchdog", daemon=True)
    set_limit(timedelta(seconds=2 * patience))
    thread.start()
    try:
        yield dog.at
    except Exception as error:
        raise _judged(dog, error) from error
    finally:
        dog.stop()
        thread.join()
        set_limit(PATIENCE)


def _judged(dog: Watchdog, error: Exception) -> Exception:
    """What to raise for an exception of this rank: another rank's fault if that came first, else its own."""
    if isinstance(error, DeloError) and error.everywhere:
        return error
    fault = dog.told()
    if fault is None:
        dog.tell(error)
        fault = dog.told()
    if fault is None or fault["rank"] == dog.ranks.rank:
        return error
    return DeloError(fault_text(fault), fix="the same command goes on from the last checkpoint")


def fault_text(fault: dict[str, Any]) -> str:
    """A told fault as a sentence."""
    return f"rank {fault['rank']} failed while {fault['phase']}: {fault['text']}"


def last_collective() -> str:
    """`#284 all_gather, not done`: the last collective this process began."""
    recorder: Any = torch._C._distributed_c10d
    trace = json.loads(recorder._dump_fr_trace_json(True, False))
    entries = trace.get("entries", [])
    if not entries:
        return "no collective yet"
    last = entries[-1]
    done = "done" if last.get("retired") else "not done"
    name = last["profiling_name"].rpartition(":")[2]
    return f"#{last['collective_seq_id']} {name} {last['input_sizes']}, {done}"


def set_limit(limit: timedelta) -> None:
    """Set the time limit of the default group's collectives."""
    distributed_c10d._set_pg_timeout(limit, distributed.group.WORLD)


def _store() -> Any:
    return distributed_c10d._get_default_store()
