"""Which records lose a modality: exact counts, as a pure function of (seed, task, split, record id)."""

import hashlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from delo_llava.errors import DeloError
from delo_llava.schema import MAX_INTEGER, Section
from delo_llava.tasks import Record, Split

#: Boolean N×2: column 0 is the image, column 1 the context text (`tasks.MODALITIES`); True means present.
Presence = NDArray[np.bool_]


class MissingSpec(Section):
    """How many records lose which modality, and what a lost image becomes.

    Attributes:
        ratio: share η of the records of every (task, split) that lose one modality.
        kind: what they lose; `both` is half of them the image and the others the text, none of them both.
        seed: seed of the draw; independent of the training seed.
        image: `absent` drops the image's tokens, `dummy` feeds a constant white image.
    """

    ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    kind: Literal["image", "text", "both"] = "both"
    seed: int = Field(default=0, ge=-MAX_INTEGER, le=MAX_INTEGER)
    image: Literal["absent", "dummy"] = "absent"


#: Named patterns of the harness: the (ratio, kind) each one stands for; `run` is the run's own specification.
PATTERNS: dict[str, tuple[float, Literal["image", "text", "both"]] | None] = {
    "run": None,
    "complete": (0.0, "both"),
    "image": (1.0, "image"),
    "text": (1.0, "text"),
}


def pattern_spec(name: str, run_spec: MissingSpec) -> MissingSpec:
    """The specification a pattern name stands for: `image` and `text` name what every record loses.

    Raises:
        DeloError: unknown pattern.
    """
    if name not in PATTERNS:
        raise DeloError("Unknown missing pattern.", given=name, allowed=PATTERNS)
    change = PATTERNS[name]
    return run_spec if change is None else run_spec.model_copy(update={"ratio": change[0], "kind": change[1]})


def presence(spec: MissingSpec, task: str, split: Split, record_ids: Sequence[str]) -> Presence:
    """The simulated presence of (image, text) for each id, by the CMML protocol (DeLo, RebQ).

    floor(η·N) records are drawn without replacement; with kind `both`, floor(n/2) of them lose the image and
    the others the text. Records are drawn in the order of sha256(seed|task|split|id), so the result depends
    neither on their order in the file nor on the platform. With `both` the kinds alternate along that order,
    so what is missing at a small η is missing at every larger one.

    Raises:
        DeloError: an id occurs twice.
    """
    if len(set(record_ids)) != len(record_ids):
        raise DeloError(f"Record ids of {task}/{split} are not unique, so no reproducible draw is possible.")
    drawn = share_of(spec.ratio, len(record_ids))
    mask = np.ones((len(record_ids), 2), dtype=np.bool_)
    if drawn == 0:
        return mask
    ranked = sorted(range(len(record_ids)), key=lambda i: hash_rank(spec.seed, task, split, record_ids[i]))
    order = ranked[:drawn]
    if spec.kind == "both":
        mask[order[1::2], 0] = False
        mask[order[0::2], 1] = False
    else:
        mask[order, 0 if spec.kind == "image" else 1] = False
    return mask


def share_of(share: float, count: int) -> int:
    """floor(share·count), the share taken as the decimal number that was written: 0.7 of 90 is 63, not 62."""
    return int(Decimal(repr(share)) * count)


def hash_rank(seed: int, task: str, split: str, record_id: str) -> bytes:
    """The key that orders records for a draw: sha256 of seed, task, split and id."""
    return hashlib.sha256("|".join((str(seed), task, split, record_id)).encode()).digest()


def limited(ids: Sequence[str], task: str, split: Split, limit: int | None) -> list[int]:
    """Indices of the records that a limit leaves: drawn by their ids, as files may be sorted by class."""
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    names = list(ids)
    return sorted(sorted(range(len(names)), key=lambda i: hash_rank(0, task, split, names[i]))[:limit])


@runtime_checkable
class Columns(Protocol):
    """Records of one (task, split) that tell their ids and what they have without being built one by one."""

    task: str
    split: Split

    @property
    def ids(self) -> Sequence[str]:
        """Every record's id."""
        ...

    @property
    def natural(self) -> Presence:
        """Whether each has (image, context) in the data itself."""
        ...


def record_presence(spec: MissingSpec, records: Sequence[Record]) -> Presence:
    """What the model really gets: the simulated presence, and absent where the record lacks the field anyway.

    The records are those of one (task, split); the draw is over all of them, also those that lack a field.
    """
    if not records:
        return np.ones((0, 2), dtype=np.bool_)
    if isinstance(records, Columns):
        return presence(spec, records.task, records.split, list(records.ids)) & records.natural
    rows = [(r.task, r.split, r.id, r.image is not None, bool(r.context)) for r in records]
    kept = presence(spec, rows[0][0], rows[0][1], [row[2] for row in rows])
    return kept & np.array([row[3:] for row in rows], dtype=np.bool_)


def effective(spec: MissingSpec, records: Sequence[Record]) -> dict[str, float]:
    """Counts and ratios of what is missing in one (task, split), simulated and in the data itself.

    Keys: `records`; `lost_image`, `lost_text` (drawn by `spec` and there to be lost), `no_image`, `no_text`
    (lacking in the data anyway), `neither` (left with the instruction only), `image_ratio`, `text_ratio`,
    `ratio` (share of records without image, without text, without at least one of them).
    """
    natural = record_presence(MissingSpec(), records)
    left = record_presence(spec, records)
    count = max(len(records), 1)
    lost, lacking = (natural & ~left).sum(0), (~natural).sum(0)
    return {
        "records": len(records),
        "lost_image": int(lost[0]),
        "lost_text": int(lost[1]),
        "no_image": int(lacking[0]),
        "no_text": int(lacking[1]),
        "neither": int((~left).all(1).sum()),
        "image_ratio": float((~left[:, 0]).sum() / count),
        "text_ratio": float((~left[:, 1]).sum() / count),
        "ratio": float((~left).any(1).sum() / count),
    }
