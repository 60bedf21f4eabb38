"""Which bases a model has: for every adapted linear, one of its input side and one of its output side, or one
for both."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)(layers\.\d+)\.")


@dataclass(frozen=True)
class Side:
    """One trained matrix of one linear, and the basis that its updates stay out of.

    Attributes:
        parameter: name of the trained tensor; outputs: it is B, whose rows are the columns of the tensor.
        linear: name of the linear within the frozen model.
        basis: name of the basis; A and B of a square linear may share one.
        unit: to which the budget belongs: everything of one decoder layer (or of the projector) that has one
            width. The paper's linears are all square of one width, where a unit is a layer.
        width: d.
    """

    parameter: str
    outputs: bool
    linear: str
    basis: str
    unit: str
    width: int

    def rows(self, tensor: Tensor, experts: int) -> Tensor:
        """The rows of each expert, E×ρ×d."""
        rows = tensor.T if self.outputs else tensor
        return rows.reshape(experts, -1, self.width)

    def tensor(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        whole = rows.reshape(-1, self.width)
        return whole.T.contiguous() if self.outputs else whole


def sides_of(shapes: Mapping[str, torch.Size], shared: bool) -> tuple[Side, ...]:
    """The sides of all linears whose pairs are among the named tensors, in their order.

    Args:
        shared: a square linear has one basis for both of its sides.
    """
    found = []
    for name, shape in shapes.items():
        place, _, rest = name.partition(".lowrank_A.")
        if not rest:
            continue
        other = f"{place}.lowrank_B.{rest}"
        linear = place.removeprefix("base_model.model.")
        widths = shape[1], shapes[other][0]
        for parameter, width, end in ((name, widths[0], "in"), (other, widths[1], "out")):
            basis = f"{linear}/{'both' if shared and widths[0] == widths[1] else end}"
            found.append(Side(parameter, end == "out", linear, basis, f"{_place(linear)}/{width}", width))
    return tuple(found)


def _place(linear: str) -> str:
    """The decoder layer of a linear; of the projector's, the module around it."""
    layer = _LAYER.search(linear)
    return layer[1] if layer else linear.rpartition(".")[0]
