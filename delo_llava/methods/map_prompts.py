"""`map_prompts`: missing-aware prompts (MAP), one for each pattern of what a sample has.

Source: Lee et al., "Multimodal Prompting with Missing Modalities for Visual Recognition", CVPR 2023 (arXiv
2303.03369), prompts at the attention; the mapping is section 12 of the specification of newer methods. (Its
name here keeps clear of Python's `map`.)

    prefix of a row = P[image present?, text present?],   L = CE

Not a continual method: the same four prompts are trained through all tasks. needs_task: no (the presence mask
instead) · encoders: none · mergeable: no · per task: nothing; a stage's folder holds all of it,
4·4·layers·2·heads·length·width bytes. `faithful` but for a fourth pattern, a sample with neither an image nor
a context (a question alone), which the paper's classification has not, and for the head, which a generative
model does not need.

Not reproduced: prompts that start as zeros with one row of ones; weight decay on the prompt of a pattern that
a task does not have.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import nn

from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._prompts import Layout, PromptMethod, PromptPlan, Tensors
from delo_llava.methods._size import Matched, matched_count
from delo_llava.methods.base import MethodConfig

POOL = "patterns"
#: Of presence of image and text.
PATTERNS = 4


class MapOptions(MethodConfig):
    """Options of the missing-aware prompts.

    Attributes:
        length: keys and values of a prompt at each layer (the paper's length 16 is 8 of each), or `match`:
            the length whose trained parameters come nearest to what a stage of `like` trains.
        like: a method's name, for `match`.
        depth: share of the layers, from the first, that have prompts (the paper's 6 of 12).
    """

    length: Matched = 8
    like: str = "delo"
    depth: float = Field(1 / 2, gt=0, le=1)


class MapPrompts(PromptMethod):
    """A frozen base and one prompt for each pattern."""

    Config = MapOptions

    def draw(self, base: nn.Module, earlier: Mapping[str, Tensors]) -> dict[str, Tensors]:
        length = self.options.length
        if length == "match":
            each = PATTERNS * self._layout(base, 1).numel
            length = matched_count(self.options.like, base, self.backbone, self.run, each)
        return {POOL: {"prompts": self._layout(base, length).draw(PATTERNS)}}

    def plan(
        self, base: nn.Module, held: Mapping[str, Tensors], inputs: RouteInputs, queries: Queries
    ) -> PromptPlan:
        pattern = 2 * inputs.presence[:, 0].long() + inputs.presence[:, 1].long()
        prompts = held[POOL]["prompts"][pattern]
        return PromptPlan(*self._layout(base, prompts.shape[-2]).prefixes(prompts))

    def _layout(self, base: nn.Module, length: int) -> Layout:
        return Layout.of(base, length, self.options.depth)


METHOD = MapPrompts
