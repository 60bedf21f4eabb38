"""What stops a run that went wrong: unlabelled batches, non-finite losses, frozen weights that moved."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from delo_llava.errors import DeloError

SHOWN_IDS = 8


def require_trained_tokens(counts: dict[str, float], record_ids: list[str]) -> None:
    """Refuse a micro-batch in which no answer token is trained.

    Raises:
        DeloError: naming the records.
    """
    if counts.get("answer", 0.0) <= 0:
        raise DeloError(
            "A batch holds no trained answer token",
            given=_ids(record_ids),
            fix="raise data.max_length, or look at these records' answers",
        )


def require_finite(loss: Tensor | float, step: int, record_ids: list[str]) -> None:
    """Stop at a loss or gradient norm that is not finite: one such step destroys the adapter.

    Raises:
        DeloError: naming the step and the records.
    """
    value = float(loss)
    if value != value or value in (float("inf"), float("-inf")):
        raise DeloError(
            f"The loss is not finite at step {step}",
            given=f"{value} with records {_ids(record_ids)}",
            fix="lower train.lr, or check these records",
        )


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A checksum of tensors' names and bits, cheap enough for a 7B base: one integer sum per tensor.

    Under ZeRO-3 it is taken of this rank's share, so it compares only with another one of the same engine.
    """
    digest = hashlib.sha256()
    for name, tensor in parameters:
        share = getattr(tensor, "ds_tensor", tensor).detach()
        digest.update(f"{name} {_bit_sum(share)}\n".encode())
    return digest.hexdigest()


def frozen_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors of everything that this stage must not change."""
    return [(name, p) for name, p in model.named_parameters() if not p.requires_grad]


def require_unchanged(before: str, after: str, task: str) -> None:
    """Compare two fingerprints of the frozen parameters.

    Raises:
        DeloError: they differ.
    """
    if before != after:
        raise DeloError(
            f"Frozen weights changed while {task} was trained",
            fix="the method must not touch frozen parameters",
        )


def _bit_sum(tensor: Tensor) -> int:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = data[: data.numel() // 4 * 4].view(torch.int32)
    return int(words.sum(dtype=torch.int64)) + 31 * int(data[words.numel() * 4 :].sum(dtype=torch.int64))


def _ids(record_ids: list[str]) -> str:
    more = f" and {len(record_ids) - SHOWN_IDS} more" if len(record_ids) > SHOWN_IDS else ""
    return ", ".join(record_ids[:SHOWN_IDS]) + more
