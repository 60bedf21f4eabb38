"""Which experts are used: entropy, never chosen factors and a map per pool, from `routing/<stage>/…`."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from delo_eval.answers.routing_use import add_pools, stage_uses
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.report.colour import palette, step_of
from delo_eval.report.content import RunContent

Counts = list[list[int]]


@dataclass(frozen=True)
class PoolUse:
    """How the pools of one task, modality and part (A or B) were used, over all adapted linears.

    Attributes:
        rows: samples behind it; shown: share of them, in percent, in which the modality was present.
        entropy: of how often each factor is chosen, from 0 (one only) to 100 (all alike); mean over linears.
        dead: factors never chosen, percent; fixed: factors chosen for every sample, percent.
        top: share of all choices that went to the most chosen factor, percent, the mean over linears.
        shift: how far the choice differs where the modality is missing, as the mean total variation between
            both distributions in percent; None unless both happened.
        map: PNG data URI, a row per linear and a column per factor, light = never, dark = in every sample.
    """

    task: str
    modality: str
    part: str
    rows: int
    shown: float
    linears: int
    factors: int
    entropy: float
    dead: float
    fixed: float
    top: float
    shift: float | None
    map: str


@dataclass(frozen=True)
class RoutingReport:
    """The pools of the latest stage that has counts, and the names of the linears behind the maps' rows."""

    stage: str
    pattern: str
    pools: list[PoolUse]
    layers: dict[str, list[str]]


def routing(content: RunContent) -> RoutingReport | None:
    """The use of every pool at the latest stage, under the run's own missing pattern; None without counts.

    Raises:
        DeloError: a file of counts is damaged.
    """
    for stage in reversed(range(len(content.plan.stages))):
        uses = list(stage_uses(content.folder, stage, RUN_PATTERN))
        if uses:
            return RoutingReport(
                content.plan.names[stage],
                RUN_PATTERN,
                list(_pools(add_pools(uses), content.tasks)),
                uses[0]["layers"],
            )
    return None


def _pools(pools: Sequence[dict[str, Any]], tasks: Sequence[str]) -> Iterable[PoolUse]:
    """One entry per task, modality and part, in training order."""
    for task in tasks:
        for modality in ("image", "text"):
            for part in ("A", "B"):
                found = {
                    pool["present"]: pool
                    for pool in pools
                    if (pool["task"], pool["modality"], pool["part"]) == (task, modality, part)
                }
                if found:
                    yield pool_use(task, modality, part, found)


def pool_use(task: str, modality: str, part: str, found: dict[bool, dict[str, Any]]) -> PoolUse:
    """The figures of one pool.

    Args:
        found: presence of the modality in the samples -> `rows` and `counts` (S×E).
    """
    counts = [
        [sum(column) for column in zip(*lines, strict=True)]
        for lines in zip(*(pool["counts"] for pool in found.values()), strict=True)
    ]
    rows = sum(pool["rows"] for pool in found.values())
    flat = [n for line in counts for n in line]
    entropies, tops = [entropy(line) for line in counts], [max(line) / (sum(line) or 1) for line in counts]
    both = [found[present]["counts"] for present in (True, False)] if len(found) == 2 else None
    return PoolUse(
        task, modality, part, rows,
        shown=100 * (found[True]["rows"] if True in found else 0) / rows,
        linears=len(counts),
        factors=len(counts[0]),
        entropy=100 * sum(entropies) / len(counts),
        dead=100 * sum(n == 0 for n in flat) / len(flat),
        fixed=100 * sum(n == rows for n in flat) / len(flat),
        top=100 * sum(tops) / len(counts),
        shift=None if both is None else 100 * _distance(*both),
        map=use_map(counts, rows),
    )  # fmt: skip


def entropy(counts: Sequence[int]) -> float:
    """Entropy of a histogram over the largest it can have, 0 … 1."""
    total = sum(counts)
    if not total or len(counts) < 2:
        return 0.0
    shares = [n / total for n in counts if n]
    return sum(share * math.log(1 / share) for share in shares) / math.log(len(counts))


def _distance(one: Counts, other: Counts) -> float:
    """Mean total variation between the lines of two sets of counts, 0 … 1."""
    distances = []
    for a, b in zip(one, other, strict=True):
        total_a, total_b = sum(a) or 1, sum(b) or 1
        distances.append(sum(abs(x / total_a - y / total_b) for x, y in zip(a, b, strict=True)) / 2)
    return sum(distances) / len(distances)


def use_map(counts: Counts, rows: int) -> str:
    """A PNG with one pixel for each linear and factor: the share of samples that chose it."""
    picture = Image.new("P", (len(counts[0]), len(counts)))
    picture.putpalette([part for colour in palette() for part in colour])
    picture.putdata([step_of(n, 0, rows) for line in counts for n in line])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
