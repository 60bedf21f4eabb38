"""`rebq`: what is missing is reconstructed as a query before prompts are asked for; components per task.

Source: Zhao et al., "Reconstruct before Query: Continual Missing Modality Learning with Decomposed Prompt
Collaboration", 2024 (arXiv 2403.11373), by its specification (sections 4 and 10, and the mapping to a
generative model).

    pool(q; layer) = Σ_k cos(q ⊙ A_k, K_k) P_k   over all tasks' components: a memory, text and image pool
    q̂_image = memory(q_text)_image,   q̂_text = memory(q_image)_text          one vector each, no layers
    prefix of a row at a layer = [text(q_text or q̂_text), image(q_image or q̂_image)]
    L = CE + α · mean over copies of ‖q̂ − q‖²

A row with neither modality is reconstructed from its instruction. needs_task: no (the presence mask
instead) · encoders: a CLIP by `encoder=FOLDER`, else the base's own · mergeable: no · per task: n
components of three pools, 4·n·(2·layers·(2·heads·length·width + 2d) + 4d) bytes. `simplified`: queries are
frozen features before the language model (as everywhere here), so the memory pool's prompts are vectors of
the query's width, and no further pass through the model is needed. For the same reason the two artificial
copies of a complete row, one modality removed from each, need no forward: what is left of them asks with
the row's own query, bit for bit.

Not reproduced: components of later tasks that stay zero (R1) and earlier ones that weight decay moves (R2);
targets that are not the queries of complete rows (R3); a reconstruction term a thousand times weaker than the
answer's (R4: distances of unit vectors are summed, not averaged, over d); passes over copies (R5); loops over
samples (R7); a pool dealt out among a number of tasks known in advance (R10).
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.data.collate import Batch
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._components import fresh_components, mixed_prompts
from delo_llava.methods._prompts import Layout, PromptMethod, PromptOptions, PromptPlan, Tensors
from delo_llava.methods._size import Matched, matched_count
from delo_llava.methods.base import Clock

MEMORY, TEXT, IMAGE = "memory", "text", "image"


class RebqOptions(PromptOptions):
    """Options of RebQ; symbols of the specification in brackets.

    Attributes:
        components: that a task adds to each pool [n], or `match`: as many as come nearest to what a stage of
            `like` trains.
        like: a method's name, for `match`.
        length: keys and values at each layer of a text or image prompt (the paper's length 8 is 4 of each).
        depth: share of the layers, from the first, that have prompts (the paper's 8 of 12).
        reconstruct: weight of the reconstruction term [α].
    """

    components: Matched = 12
    like: str = "delo"
    length: int = Field(4, ge=1)
    depth: float = Field(2 / 3, gt=0, le=1)
    reconstruct: float = Field(1.0, ge=0)


class Rebq(PromptMethod):
    """A frozen base and three pools of components that grow by task."""

    Config = RebqOptions
    growing = (MEMORY, TEXT, IMAGE)

    def draw(self, base: nn.Module, earlier: Mapping[str, Tensors]) -> dict[str, Tensors]:
        layout, width = self._layout(base), self.width(base)
        count = self.options.components
        if count == "match":
            each = 2 * (layout.numel + 2 * layout.layers * width) + 4 * width
            count = matched_count(self.options.like, base, self.backbone, self.run, each)
        shapes = {MEMORY: (1, 2, width), TEXT: layout.shape, IMAGE: layout.shape}
        return {
            name: fresh_components(count, shape, width, earlier.get(name)) for name, shape in shapes.items()
        }

    def plan(
        self, base: nn.Module, held: Mapping[str, Tensors], inputs: RouteInputs, queries: Queries
    ) -> PromptPlan:
        guesses = reconstructed(queries, inputs.presence, held[MEMORY])
        has_image, has_text = inputs.presence[:, :1], inputs.presence[:, 1:]
        image = torch.where(has_image, queries.image, guesses[:, 0])
        text = torch.where(has_text, queries.text, guesses[:, 1])
        # Side by side along the length of R×layers×2×heads×length×width.
        prompts = torch.cat([mixed_prompts(text, held[TEXT]), mixed_prompts(image, held[IMAGE])], dim=4)
        truth = torch.stack([queries.image, queries.text], 1)
        error = (guesses - truth).square().sum((1, 2)) * inputs.presence.all(1)
        return PromptPlan(*self._layout(base).prefixes(prompts), {"reconstruct": error})

    def counts(self, batch: Batch) -> dict[str, float]:
        copies = 0.0 if batch.filler else 2.0 * float(batch.presence.all(1).sum())
        return super().counts(batch) | {"reconstruct": copies}

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"reconstruct": self.options.reconstruct}

    def _layout(self, base: nn.Module) -> Layout:
        return Layout.of(base, self.options.length, self.options.depth)


def reconstructed(queries: Queries, presence: Tensor, memory: Tensors) -> Tensor:
    """What each row's image and text query would be judging by the other one, R×2×d.

    Args:
        queries: R×d each, zero where absent; presence: bool R×2 (image, text).
        memory: components whose prompts are 1×2×d: an image query's part and a text query's.
    """
    has_image, has_text = presence[:, :1], presence[:, 1:]
    # A row with neither modality asks with its instruction, which is always there.
    by_text = torch.where(has_text, queries.text, queries.instruction * ~has_image)
    by_image = torch.where(has_image, queries.image, queries.instruction * ~has_text)
    image = mixed_prompts(by_text, memory)[:, 0, 0]
    return torch.stack([image, mixed_prompts(by_image, memory)[:, 0, 1]], 1)


METHOD = Rebq
