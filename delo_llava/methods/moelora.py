"""`moelora`: low-rank experts under a token-wise softmax router in every linear, trained through all tasks.

Source: the MoELoRA of CoIN (Chen et al., NeurIPS 2024 datasets and benchmarks track; specification:
baselines, "MoELoRA"): y = W₀x + (alpha/r)·Σ_i softmax(Rx)_i B_i A_i x, N experts of rank r/N, one router per
adapted linear without bias, A ~ N(0, 0.01²), B = 0. There is no balance loss in CoIN, and none here.

needs_task: no; encoders: none; mergeable: no, since the weights differ from token to token; per task: nothing
is kept, the one adapter is trained on (its file holds (r + N)·d_in + r·d_out fp32 values per linear).
Faithful by default; `top_k` is not of CoIN.
Not reproduced: the releases read `merge()` as done when it does nothing.
"""

from pydantic import Field
from torch import nn

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.methods._experts import ExpertOptions, TokenExperts
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods.base import Stage

#: Standard deviation of A at the start.
SPREAD = 0.01


class MoeLoraOptions(ExpertOptions):
    """Options of MoELoRA.

    Attributes:
        experts: N, that share the rank of each pair.
    """

    experts: int = Field(8, ge=1)


class MoeLora(TokenExperts):
    """Nothing but the model itself goes from task to task."""

    Config = MoeLoraOptions

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        model = super().begin(base, stage)
        if not stage.past:
            for layer in (m for m in model.modules() if isinstance(m, LowRankLayer)):
                nn.init.normal_(layer.lowrank_A[ADAPTER].weight, std=SPREAD)  # type: ignore[arg-type]
        return model


METHOD = MoeLora
