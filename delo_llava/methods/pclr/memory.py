"""What PCLR keeps of its pool beside the ranks: keys, the tasks' queries, and how the ranks lie in a pair."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from delo_llava.files import write_json_atomic
from delo_llava.strict import read_json, read_tensors

KEYS, FACTS = "pclr.safetensors", "pclr.json"


@dataclass(frozen=True)
class Pool:
    """What a stage left besides its ranks.

    Attributes:
        keys: N×2×d float64, of the ranks without the shared ones; queries: T×2×d, of the tasks.
        tasks: names in order; rank: R; new: how many of the last ranks are the newest task's.
        shared: ranks in front of the pair that have no key; compressed: the pool was full once.
    """

    keys: Tensor
    queries: Tensor
    tasks: tuple[str, ...] = ()
    rank: int = 0
    new: int = 0
    shared: int = 0
    compressed: bool = False

    @classmethod
    def empty(cls, hidden: int) -> "Pool":
        """Before the first task."""
        nothing = torch.zeros(0, 2, hidden, dtype=torch.float64)
        return cls(nothing, nothing)

    def save(self, folder: Path) -> None:
        """Write it beside the adapter."""
        save_file({"keys": self.keys.contiguous(), "queries": self.queries.contiguous()}, folder / KEYS)
        names = ("tasks", "rank", "new", "shared", "compressed")
        write_json_atomic(folder / FACTS, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, folder: Path) -> "Pool":
        """Read what `save` wrote."""
        facts = read_json(folder / FACTS, "The pool of a stage", "train the stage again")
        tensors = read_tensors(folder / KEYS, "The keys of a stage", "train the stage again")
        facts["tasks"] = tuple(facts["tasks"])
        return cls(tensors["keys"], tensors["queries"], **facts)
