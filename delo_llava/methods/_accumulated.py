"""What methods share whose updates add up: a fresh adapter per task over all that was learned before.

Merging into a 4-bit base would quantise it anew at every task. So what is merged elsewhere is kept here as
one frozen low-rank adapter beside the base, which is the same function (`W + Σ_τ s·B_τ A_τ`), and is folded
into 16-bit weights when a model is exported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from delo_llava.adapters.lowrank import accumulate
from delo_llava.methods._lora import bare
from delo_llava.methods._lowrank import LowRankMethod, activate
from delo_llava.methods.base import Footprint, Past, Stage

#: The adapter that earlier stages were put together into.
EARLIER = "earlier_stages"


class AccumulatedMethod(LowRankMethod):
    """Stage t trains an adapter of its own on the base with Σ_{τ<t} of the earlier ones, which stays frozen.

    A linear costs four products for any number of stages: two for all earlier ones, two for the last.
    """

    def begin(self, base: nn.Module, stage: Stage) -> Any:
        if not stage.past:
            return self.fresh(base, stage.name)
        model = self.opened(base, stage.past)
        earlier = _together(model, list(stage.past))
        model.add_adapter(stage.name, self.config(base))
        activate(model, [*earlier, stage.name], train=[stage.name])
        return model

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> Any:
        if not past:
            return bare(base)
        model = self.opened(base, past)
        *earlier, last = past
        activate(model, [*_together(model, earlier), last], train=[])  # summed as in training
        return model

    def footprint(self, base: nn.Module) -> Footprint:
        return replace(super().footprint(base), every_task=True)


def _together(model: Any, names: Sequence[str]) -> list[str]:
    """The names of what acts for some adapters: one of them, or what they were put together into."""
    if len(names) < 2:
        return list(names)
    accumulate(model, names, EARLIER)
    return [EARLIER]
