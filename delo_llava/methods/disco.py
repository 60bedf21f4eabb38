"""`disco`: a low-rank pair per task; at test all layers weigh the tasks by a sample's text.

Paper: "Federated Continual Instruction Tuning" (DISCO), ICCV 2025 (arXiv 2503.12897), in the centralised form
of MCITlib; specification 10 of newer_methods. What is federated in it (clients, rounds, cache by text
similarity) is no part of this: it is a per-task LoRA with a text-similarity mixture.

    training   y = W₀x + s·B_t A_t x
    at test    y = W₀x + s·Σ_i w_i B_i A_i x in every layer,   w = softmax(cos(a_i, text) / τ),  τ = 0.05

needs_task: no. encoders: the paper's CLIP by `encoder=FOLDER`; the base's own frozen embeddings by default.
mergeable: no. Bytes per task: the pair and 3·(d + 1)·8 bytes of anchors.

faithful to the centralised form, but that the query is a sample's own where the released code takes the mean
of the batch; the anchor's mean equals its running sum, since a cosine sees no length. One weight of one is
that task's LoRA exactly.
"""

from typing import Literal

from pydantic import Field

from delo_llava.methods._slots import SlotMethod, SlotOptions
from delo_llava.methods.base import Capabilities


class DiscoOptions(SlotOptions):
    """Options of DISCO's mixture.

    Attributes:
        temperature: of the softmax over the tasks' similarities.
        views: the evidence for a task; the paper's is the text alone.
    """

    temperature: float = Field(0.05, gt=0)
    views: tuple[Literal["image", "text", "instruction"], ...] = ("instruction",)


class Disco(SlotMethod):
    """A block-diagonal mixture of the tasks' pairs."""

    Config = DiscoOptions
    capabilities = Capabilities(answers_as_trained=False)


METHOD = Disco
