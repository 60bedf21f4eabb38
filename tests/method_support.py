"""Stand-ins for what training hands to a method, and what its layers did in a forward."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from delo_llava.adapters.carrier import routing
from delo_llava.adapters.lowrank import RowPlan, lowrank
from delo_llava.data.collate import Batch
from delo_llava.methods.base import Clock

#: The first of a hundred steps.
START = Clock(0, 100, 10)


def alone(tensor: Any) -> Any:
    """The sum over the ranks of one process."""
    return tensor


class Given:
    """Passes over batches that are there already, whatever part of them is asked for."""

    def __init__(self, batches: Sequence[Batch] = ()) -> None:
        self.batches = list(batches)

    def all(self, size: int | None = None) -> Iterator[Batch]:
        return iter(self.batches)

    def drawn(self, count: int, size: int | None = None) -> Iterator[Batch]:
        return iter(self.batches)

    def complete(self, count: int) -> Iterator[Batch]:
        return iter(self.batches)


def seen_by_layers(
    model: Any, method: Any, batch: Any
) -> tuple[RowPlan, dict[str, tuple[Any, Tensor, Tensor]]]:
    """The decision of a forward, and (layer, input, output) of every adapted linear by its name."""
    seen: dict[str, tuple[Any, Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, y: seen.__setitem__(m.name, (m, a[0], y)))
        for part in lowrank(model).layers()
        for layer in part
    ]
    with torch.no_grad(), routing(model, method.inputs(batch)) as route:
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    return route.plan, seen
