"""The processes of a run: who am I, how sums and barriers are taken, how many threads each may use."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from delo_llava.config import RunConfig
from delo_llava.engines import signals
from delo_llava.engines.group import init_deepspeed_group
from delo_llava.engines.launched import GROUP, device_number, launched, require_group
from delo_llava.engines.signals import Preempted
from delo_llava.errors import DeloError

T = TypeVar("T")

#: Under this key of the process group's store a rank tells the others that it was asked to leave.
LEAVE = "delo_llava/leave"
#: Evaluation on one rank may be much longer than on another, so waiting ranks must be patient.
PATIENCE = timedelta(hours=12)
#: torch's flight recorder, which knows the collectives of a process; read when the process group is made.
RECORDER, RECORDED = "TORCH_FR_BUFFER_SIZE", "200"


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank, world: number of this process and of all processes.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            distributed.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, on every rank, with the device and dtype it had."""
        if self.world == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank must ask."""
        if self.world == 1:
            return flag
        device = self.device if distributed.get_backend() == "nccl" else "cpu"
        found = torch.tensor([int(flag)], device=device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return bool(found.item())

    def leave_if_asked(self, where: str) -> None:
        """Leave if any rank was asked to: all of them leave here, together. Every rank must call it.

        Raises:
            Preempted: on every rank.
        """
        if self.any(signals.requested() is not None):
            raise Preempted(signals.requested() or "another rank's signal", where)

    def leave_soon(self) -> bool:
        """Whether this rank got a signal, or a peer that got one said so: a look, without waiting for anyone.

        For work of unequal length (batches of an evaluation): a rank that sees it stops, saves what is its
        own and goes on to the next `leave_if_asked`.
        """
        own = signals.requested() is not None
        if self.world == 1:
            return own
        # Not an all-reduce, for which the others would have to come, and not a file, which another node may
        # see late: the group's own key-value store.
        store = distributed.distributed_c10d._get_default_store()
        if own:
            store.set(LEAVE, "1")
        return own or bool(store.check([LEAVE]))

    def same(self, value: T) -> T:
        """The first rank's `value`, on every rank."""
        if self.world == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told, src=0, device=self.device)
        return told[0]

    def each(self, value: T) -> list[T]:
        """Every rank's `value`, in their order, on every rank."""
        if self.world == 1:
            return [value]
        told: list[Any] = [None] * self.world
        distributed.all_gather_object(told, value)
        return told

    def union(self, entries: dict[str, str]) -> dict[str, str]:
        """The entries of all ranks together, on every rank."""
        return {key: value for found in self.each(entries) for key, value in found.items()}

    def run_each(self, action: Callable[[], None]) -> None:
        """Run `action` on every rank; a DeloError of any of them is raised on all.

        Raises:
            DeloError: the first one, by rank.
        """
        fault: DeloError | None = None
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the others wait for this rank's word, whatever it is
            fault = as_fault(error)
        self.agree(fault)

    def agree(self, fault: DeloError | None) -> None:
        """Raise the ranks' faults on all of them; every rank must ask.

        Raises:
            DeloError: this rank's own, else the first one, by rank.
        """
        told = self.each(None if fault is None else str(fault))
        if fault is not None:
            fault.everywhere = True
            raise fault
        for rank, text in enumerate(told):
            if text is not None:
                raise DeloError(f"rank {rank}: {text}", everywhere=True)

    def run_first(self, action: Callable[[], None]) -> None:
        """Run `action` on the first rank while the others wait; its DeloError is raised on all of them.

        Raises:
            DeloError: what `action` raised on the first rank.
        """
        fault: DeloError | None = None
        if self.first:
            try:
                action()
            except Exception as error:
                if self.world == 1:
                    raise
                fault = as_fault(error)
        if self.world > 1:
            told = self.same(str(fault) if fault else None)
            if told is not None and fault is None:
                raise DeloError(told, everywhere=True)
        if fault is not None:
            fault.everywhere = True
            raise fault


def as_fault(error: Exception) -> DeloError:
    """Any exception as an error that can be told on every rank."""
    if isinstance(error, DeloError):
        return error
    fault = DeloError(f"{type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault


def start_ranks(config: RunConfig) -> Ranks:
    """Join the process group (by DeepSpeed, unless `zero` is `none`) and share the cores among local ranks.

    Raises:
        DeloError: CUDA asked for and absent, fewer GPUs than processes, words of the launcher that are
            missing or mean nothing, or a group smaller than it said.
    """
    require_group()
    device, here = _device(config), launched()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here.local_world))
    if config.zero == "none":
        return Ranks(0, 1, device)
    if not distributed.is_initialized():
        os.environ.setdefault(RECORDER, RECORDED)
        _complete_environment()
        init_deepspeed_group(device, PATIENCE)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    if ranks.world != here.world:
        raise DeloError(
            "The process group is smaller than the launcher said", given=ranks.world, allowed=[here.world]
        )
    return ranks


def stop_ranks(ranks: Ranks) -> None:
    """Leave the process group after every rank arrived."""
    if distributed.is_initialized():
        ranks.barrier()
        distributed.destroy_process_group()


def _device(config: RunConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeloError("There is no CUDA device here", given=config.device, allowed=["auto", "cpu"])
    device = torch.device("cuda", device_number(torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _complete_environment() -> None:
    """Without a launcher DeepSpeed would look for MPI; one process alone can name itself."""
    if all(name in os.environ for name in GROUP):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)
