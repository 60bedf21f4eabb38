"""What a launcher (deepspeed, torchrun) said to this process in its environment, read without torch.

RANK, WORLD_SIZE              which process this is, and how many there are
LOCAL_RANK, LOCAL_WORLD_SIZE  the same on this machine (`deepspeed` says LOCAL_SIZE for the second)
MASTER_ADDR, MASTER_PORT      where the processes meet
"""

import os
from dataclasses import dataclass

from delo_llava.errors import DeloError

#: What a launcher sets for every process of a group.
GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAST_PORT = 65535
FIX = "let `deepspeed` or `torchrun` set it, or unset it to run in one process"


@dataclass(frozen=True)
class Launched:
    """This process as its launcher counts it; without a launcher it is alone.

    Attributes:
        rank, world: number of this process and of all processes.
        local_rank, local_world: the same among the processes of this machine.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int


def launched() -> Launched:
    """What the launcher said.

    Raises:
        DeloError: one of its words is no number, or none that can be.
    """
    world = _number("WORLD_SIZE", 1, least=1)
    here = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    _number("MASTER_PORT", 1, least=1, most=LAST_PORT)
    return Launched(
        _number("RANK", 0, most=world - 1),
        world,
        _number("LOCAL_RANK", 0, most=world - 1),
        _number(here, world, least=1, most=world),
    )


def require_group() -> None:
    """Let several processes not look for each other without a place to meet.

    Raises:
        DeloError: there are several, and a word is missing that says which this is or where they meet.
    """
    world = launched().world
    missing = [name for name in GROUP if name not in os.environ]
    if world > 1 and missing:
        raise DeloError(
            f"WORLD_SIZE says that there are {world} processes, but {', '.join(missing)} is not set",
            given=", ".join(f"{name}={os.environ[name]}" for name in GROUP if name in os.environ),
            fix="start them with `deepspeed` or `torchrun`, or unset WORLD_SIZE to run in one process",
        )


def speaks() -> bool:
    """Whether this process tells what all of them know: rank 0, and any that cannot know its number."""
    try:
        return int(os.environ.get("RANK", "0")) <= 0
    except ValueError:
        return True


def device_number(count: int) -> int:
    """The GPU of this process.

    Args:
        count: how many this process sees.

    Raises:
        DeloError: there are fewer than processes on this machine.
    """
    number = launched().local_rank
    if number >= count:
        raise DeloError(
            "There is no GPU for this process",
            given=f"LOCAL_RANK={number}, {count} GPU{'s' * (count != 1)} seen",
            fix="start as many processes a machine as it has GPUs, look at CUDA_VISIBLE_DEVICES, or take "
            "--device cpu",
        )
    return number


def _number(name: str, default: int, *, least: int = 0, most: int | None = None) -> int:
    """The whole number in an environment variable."""
    text = os.environ.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        raise DeloError(
            f"The environment variable {name} must be a whole number",
            given=f"{name}={text}",
            allowed=[f"{least} or more" if most is None else f"{least} to {most}"],
            fix=FIX,
        )
    return number
