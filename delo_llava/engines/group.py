"""DeepSpeed as a package, and the process group through it; only here is it imported."""

import os
from datetime import timedelta
from typing import Any

import torch


def init_deepspeed_group(device: torch.device, timeout: timedelta) -> None:
    """Join the process group through DeepSpeed: NCCL on CUDA, gloo on the CPU."""
    deepspeed = import_deepspeed(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def import_deepspeed(device: torch.device) -> Any:
    """The package, told what to compute on and to keep quiet."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Joining the group would compile a shared-memory op for a minute or two, and a kill meanwhile leaves
        # a lock that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed
