"""Queries and pools without a model, and a method's plan over a tiny base."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from contract_support import Bench

from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._prompts import prompts_of
from delo_llava.methods.base import Stage

#: Of the tiny LLaVA: queries, layers, heads and width of the keys.
WIDTH, LAYERS, HEADS, HEAD = 64, 2, 2, 32


def unit(*shape: int) -> Tensor:
    """Random vectors of length one."""
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def queries(presence: list[tuple[bool, bool]], width: int = WIDTH) -> Queries:
    """A row's queries: zero where a view is absent."""
    image, text = (torch.tensor([p[i] for p in presence]).float().unsqueeze(1) for i in (0, 1))
    rows = len(presence)
    return Queries(unit(rows, width) * image, unit(rows, width) * text, unit(rows, width))


def inputs(presence: list[tuple[bool, bool]], tasks: Any = None) -> RouteInputs:
    """What routing knows of rows without images of their own."""
    ids, none = torch.zeros(len(presence), 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return RouteInputs(ids, ids.to(torch.uint8), torch.tensor(presence), none, none, None, tasks=tasks)


class Built:
    """A method at the start of its first stage on the tiny LLaVA, its prompts drawn with some spread."""

    def __init__(self, name: str, kind: str = "llava", **options: Any) -> None:
        self.bench = Bench(name, kind, **options)
        self.method: Any = self.bench.method
        self.model = self.bench.begin(Stage(0, "task0", seed=3))
        torch.manual_seed(5)

    def held(self) -> dict[str, dict[str, Tensor]]:
        """The pools as they are."""
        found: dict[str, dict[str, Tensor]] = prompts_of(self.model)()
        return found

    def plan(self, asked: Queries, presence: list[tuple[bool, bool]], tasks: Any = None) -> Any:
        """What the rows read."""
        return self.method.plan(self.model, self.held(), inputs(presence, tasks), asked)


def cosine(one: Tensor, other: Tensor) -> float:
    """In float64, written out."""
    a, b = one.detach().double(), other.detach().double()
    return float((a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt()))


def view_cosine(asked: Queries, row: int, key: Tensor) -> float:
    """Mean over the views that a row has of the cosine to the key's part, 3×d."""
    found = [cosine(q[row], part) for q, part in zip(asked, key, strict=True) if bool((q[row] != 0).any())]
    return sum(found) / len(found)
