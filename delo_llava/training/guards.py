"""What stops a run that went wrong: unlabelled batches, non-finite losses, full memory, frozen weights that
moved."""

import hashlib
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from delo_llava.config import RunConfig, TrainConfig
from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError

SHOWN_IDS = 8
#: Bytes that a rank needs at most: from the configuration, the number of ranks, and whether it is on CUDA.
Planner = Callable[[RunConfig, int, bool], int]
#: How the CPU's allocators say that there is no more; CUDA's has an exception of its own.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")


class OutOfMemory(DeloError):
    """A step did not fit into memory."""


def require_trained_tokens(counts: dict[str, float], record_ids: list[str]) -> None:
    """Refuse a micro-batch in which no answer token is trained.

    Raises:
        DeloError: naming the records.
    """
    if counts.get("answer", 0.0) <= 0:
        raise DeloError(
            "A batch holds no trained answer token",
            given=_ids(record_ids),
            fix="correct these records' answers; the same command goes on",
        )


def judge_nonfinite(train: TrainConfig, step: int, record_ids: list[str], skipped: int) -> None:
    """Whether a step that was left out, as its loss or gradient is not finite, may be passed over; every rank
    is given the same and judges alike.

    Args:
        record_ids: the records whose loss is not finite, or all of the step if only the gradient is not.
        skipped: steps left out in this stage, this one included.

    Raises:
        DeloError: naming the step and the records, unless the policy is `skip` and the limit not reached.
    """
    if train.on_nonfinite == "skip" and skipped <= train.max_nonfinite:
        return
    limit = "" if train.on_nonfinite == "stop" else f" ({skipped} steps of this stage, too many)"
    raise DeloError(
        f"Loss or gradient is not finite at step {step}{limit}",
        given=f"records {_ids(record_ids)}",
        fix="go on without such steps: --train.on_nonfinite=skip; or begin anew with a lower train.lr, in "
        "another --output",
        everywhere=True,
    )


def judge_bad_images(names: dict[str, str], limit: int) -> None:
    """Stop when too many records of a stage have images that cannot be read; every rank is given the same.

    Raises:
        DeloError: naming them.
    """
    if len(names) > limit:
        raise DeloError(
            f"{len(names)} records have images that cannot be used; data.max_bad_images allows {limit}",
            given=_ids([f"{name}: {why}" for name, why in sorted(names.items())]),
            fix="mend the files, or raise data.max_bad_images",
            everywhere=True,
        )


@contextmanager
def memory_told(train: TrainConfig, device: torch.device, planned: Callable[[], str]) -> Iterator[None]:
    """Tell that memory is full in one message.

    Args:
        planned: says what was to be expected; asked only when memory is full.

    Raises:
        OutOfMemory: the block ran out of memory; what it used, what was planned, and what helps.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if not isinstance(error, MemoryError) and not any(text in told for text in OUT_OF_MEMORY):
            raise
        raise OutOfMemory(
            f"Out of memory on {device}",
            given=f"{memory_used(device)}; {planned()}; train.micro_batch={train.micro_batch}",
            fix=f"--train.micro_batch={max(1, train.micro_batch // 2)} (the global batch stays), "
            "--train.gradient_checkpointing=true, --zero 3, or --train.on_oom=halve",
        ) from error


def memory_planned(planner: Planner | None, config: RunConfig, ranks: Ranks) -> str:
    """What the planner expects of a stage on each device, or why it cannot say."""
    if planner is None:
        return "no plan"
    try:
        count = planner(config, ranks.world, ranks.device.type == "cuda")
    except (DeloError, RuntimeError, ValueError, MemoryError) as error:
        return f"no plan: {str(error).partition(chr(10))[0]}"
    return f"planned {gib(count)} for data.max_length={config.data.max_length}"


def memory_used(device: torch.device) -> str:
    """Peak and total memory of the device, or of this process on the CPU."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"used {gib(peak)} of {gib(total)}"


def gib(count: int) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.1f} GiB"


def smaller_micro_batch(train: TrainConfig, world: int) -> int | None:
    """The largest micro-batch of at most half the size that divides a rank's share; None below 1."""
    share = train.global_batch // world
    fits = [size for size in range(1, train.micro_batch // 2 + 1) if share % size == 0]
    return max(fits, default=None)


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


def require_unchanged(before: str, after: str) -> None:
    """Compare two fingerprints of the frozen parameters.

    Raises:
        DeloError: they differ.
    """
    if before != after:
        raise DeloError(
            "Frozen weights changed during training",
            fix="the method must not touch frozen parameters",
        )


def _bit_sum(tensor: Tensor) -> int:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = data[: data.numel() // 4 * 4].view(torch.int32)
    return int(words.sum(dtype=torch.int64)) + 31 * int(data[words.numel() * 4 :].sum(dtype=torch.int64))


def _ids(record_ids: list[str]) -> str:
    more = f" and {len(record_ids) - SHOWN_IDS} more" if len(record_ids) > SHOWN_IDS else ""
    return ", ".join(record_ids[:SHOWN_IDS]) + more
