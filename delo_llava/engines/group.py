"""DeepSpeed as a package, and the process group through it; only here is it imported."""

import os
from datetime import timedelta
from typing import Any

import torch

from delo_llava.errors import DeloError


def init_deepspeed_group(device: torch.device, timeout: timedelta) -> None:
    """Join the process group through DeepSpeed: NCCL on CUDA, gloo on the CPU."""
    deepspeed = import_deepspeed(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def import_deepspeed(device: torch.device) -> Any:
    """The package, told what to compute on and to keep quiet.

    Raises:
        DeloError: this process has used it on another kind of device, which it keeps.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Joining the group would compile a shared-memory op for a minute or two, and a kill meanwhile leaves
        # a lock that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    kept = deepspeed.accelerator.get_accelerator().device_name()
    if kept != device.type:
        raise DeloError(
            "DeepSpeed keeps the kind of device that a process used first.",
            given=f"{device.type}, after {kept}",
            fix="start another process, or --zero=none",
        )
    return deepspeed
