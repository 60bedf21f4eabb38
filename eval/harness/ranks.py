"""The processes that evaluate together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from delo_llava.backbones.base import resolve_device
from delo_llava.config import RunConfig
from delo_llava.engines.launched import device_number, launched, require_group
from delo_llava.engines.ranks import PATIENCE, Ranks


def current_ranks(config: RunConfig) -> Ranks:
    """This process in the initialised process group, or alone, on the device the configuration names."""
    grouped = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    return Ranks(rank, world, resolve_device(config.device))


@contextmanager
def launched_ranks(config: RunConfig) -> Iterator[Ranks]:
    """Join the processes that torchrun or deepspeed started to evaluate only, and leave them at the end.

    Collectives are few and tiny (barriers, a count), so gloo serves on every device.

    Raises:
        DeloError: the launcher's words are missing or mean nothing, or there are fewer GPUs than processes.
    """
    require_group()
    here = launched()
    if here.world == 1:
        yield current_ranks(config)
        return
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(device_number(torch.cuda.device_count()))
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here.local_world))
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield current_ranks(config)
    finally:
        distributed.destroy_process_group()
