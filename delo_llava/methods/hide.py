"""`hide`: a low-rank pair per task; at test the top layer weighs the tasks per sample, the others sum them.

Paper: Guo et al., "HiDe-LLaVA: Hierarchical Decoupling for Continual Instruction Tuning of Multimodal Large
Language Model", ACL 2025 (arXiv 2503.12941); specification 7 of newer_methods.

    training          y = W₀x + s·B_t A_t x                            (the pair of the task alone)
    at test, top      y = W₀x + s·Σ_i w_i B_i A_i x,   w = softmax(mean cosine to task i's anchors / τ)
    at test, others   y = W₀x + s·Σ_j B_j A_j x, or with `cross_terms`  y = W₀x + s·(Σ_j B_j)(Σ_i A_i) x

needs_task: no. encoders: the paper's CLIP by `encoder=FOLDER`; the base's own frozen tower and embeddings by
default. mergeable: all but the top layer, after each stage. Bytes per task: the pair and 3·(d + 1)·8 bytes of
anchors.

simplified: the projector is adapted by pairs as everything else, and summed, where the paper trains it
whole through all tasks; both of an encoder's features are of its joint space, where the paper takes the text
before the projection. Not reproduced from the released code: the cross terms B_j A_i, which keep the rank at
that of one task, are an option and not the default (T1); the top layer is the model's last one and not number
31 (T2); similarities are a sample's own and no maximum over the batch (T3); anchors are exact means, reduced
over ranks (T4); tasks that were not trained have no weight (T5).
"""

import re
from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer, lowrank
from delo_llava.errors import DeloError
from delo_llava.methods._slots import SlotMethod, SlotOptions, expanded, fused
from delo_llava.methods.base import Capabilities, Past


class HideOptions(SlotOptions):
    """Options of HiDe-LLaVA.

    Attributes:
        cross_terms: multiply the sums of B and of A, as the released code does, in place of summing the
            products.
        top_layers: layers of the language model, from the last one down, that weigh the tasks per sample; 0
            sums the tasks everywhere.
    """

    cross_terms: bool = False
    top_layers: int = Field(1, ge=0)


class Hide(SlotMethod):
    """Task-specific expansion at the top, task-general fusion below."""

    Config = HideOptions
    capabilities = Capabilities(answers_as_trained=False)
    _top: frozenset[int] = frozenset()

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        model = super().load(base, past)
        if past:
            found = {number_of(layer.name) for layer in lowrank(model).layers()[0]}
            self._top = frozenset(sorted(found)[len(found) - self.options.top_layers :])
        return model

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        if not layer.projector and number_of(layer.name) in self._top:
            return expanded(layer, x)
        return fused(layer, x, self.options.cross_terms)


def number_of(name: str) -> int:
    """The number of the decoder layer that a linear belongs to.

    Raises:
        DeloError: its name has none.
    """
    found = re.search(r"\.(?:layers|blocks|h)\.(\d+)\.", name)
    if found is None:
        raise DeloError("The layers of this family have no numbers", given=name, fix="choose another method")
    return int(found.group(1))


METHOD = Hide
