"""Room on the disk for what a run has still to write, known before a stage's first step."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from delo_llava.config import TrainConfig
from delo_llava.errors import DeloError

#: Bytes of a trained parameter in a published adapter, and in a checkpoint with both moments of AdamW.
STORED, CHECKPOINTED = 4, 12


def room_needed(
    model: nn.Module, state: Mapping[str, Tensor], train: TrainConfig, stages: int, steps: int, saved: int
) -> int:
    """Bytes that the adapters of the stages to come and this stage's checkpoints take at least.

    Args:
        model: with whole parameters, as no engine holds it yet.
        state: what the method keeps in a checkpoint besides.
        stages: that are not published, this one included.
        steps: of this stage.
        saved: checkpoints of it that are there already.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    beside = sum(t.numel() * t.element_size() for t in state.values())
    saves = min(train.keep + 1, steps // train.save_every) if train.save_every else 0
    checkpoints = max(0, saves - saved) * (CHECKPOINTED * trained + beside)
    return stages * STORED * trained + checkpoints


def require_room(folder: Path, needed: int) -> None:
    """Refuse a disk on which a run will not fit.

    Raises:
        DeloError: less is free than it will write; both are told.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DeloError(
            "The disk has too little room for the adapters and checkpoints that this run will write",
            given=f"{folder}: {free >> 20:,} MiB free, at least {needed >> 20:,} MiB needed",
            fix="make room there, keep fewer checkpoints (--train.keep=1, --train.save_every=0), or move the "
            "run's folder to another disk; the same command goes on",
        )
