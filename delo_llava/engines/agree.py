"""All ranks must run the same code on the same data with the same settings: compared at the start."""

import hashlib
from collections.abc import Callable
from typing import Any

from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError

#: Differences that are shown.
SHOWN = 20
#: Key of a rank's facts that two ranks of one job never differ in: the run's folder.
FOLDER = "config output"
#: What helps, by whether that differs.
FIX = {
    False: "install one version on all nodes, and give them the same settings, data and base",
    True: "two jobs have met on one port: give each its own, as in `deepspeed --master_port 29501 …`",
}


def require_agreement(ranks: Ranks, facts: Callable[[], dict[str, Any]]) -> None:
    """Compare every rank's `facts` with those of the others.

    Raises:
        DeloError: on every rank; each difference with the ranks and their values.
    """
    if ranks.world == 1:
        return
    mine: dict[str, Any] = {}
    ranks.run_each(lambda: mine.update(facts()))
    if len(set(ranks.each(_digest(mine)))) == 1:
        return
    everyone = ranks.each(mine)
    keys = sorted({key for found in everyone for key in found})
    lines = [line for key in keys for line in _line(key, everyone)]
    more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    raise DeloError(
        "\n".join(["The ranks do not run the same thing:", *lines[:SHOWN], *more]),
        fix=FIX[len({str(found.get(FOLDER)) for found in everyone}) > 1],
        everywhere=True,
    )


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(found.items(), key=lambda item: item[0])).encode()).hexdigest()


def _line(key: str, everyone: list[dict[str, Any]]) -> list[str]:
    """One line if the ranks differ in `key`: each value with the ranks that have it."""
    holders: dict[str, list[int]] = {}
    for rank, found in enumerate(everyone):
        holders.setdefault(str(found.get(key)), []).append(rank)
    if len(holders) == 1:
        return []
    told = ", ".join(f"{value} on rank {' '.join(map(str, ranks))}" for value, ranks in holders.items())
    return [f"  {key}: {told}"]
