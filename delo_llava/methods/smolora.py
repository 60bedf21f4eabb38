"""`smolora`: in every linear one expert for what is seen and one for what is asked, through all tasks.

Paper: "Separable Mixture of Low-Rank Adaptation for Continual Visual Instruction Tuning", ICCV 2025;
specification 8 of newer_methods. With E experts of each kind, of rank ρ, in one pair of rank r = 2Eρ:

    i = argmax G_vu(x̄),  j = argmax G_if(e)     x̄: a sample's mean input of the layer, e: its instruction
    u = s·B_i A_i x,  v = s·B_j A_j x
    y = W₀x + a·u + b·v,   (a, b) = softmax(f_u·u, f_v·v) for every token

needs_task: no. encoders: the paper's sentence encoder's place is taken by a CLIP's text features by
`encoder=FOLDER`; the base's own frozen word embeddings by default. mergeable: no. Per task: nothing is kept,
the one adapter is trained on.

simplified in the encoder of the instruction. Not reproduced from the released code: its gates enter by an
argmax alone and get no gradient, so they are random frozen hashes (T1; `gate: none` restores that); it is
told the true kind of instruction at test, where here the prompt's own words are embedded (T2); it routes anew
at every decoded token, where here the prefill decides for the whole answer (T3).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, RowPlan, mixed
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._experts import gates, weighted
from delo_llava.methods._instances import at_prefill, instance_means
from delo_llava.methods._linears import Linears
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods._routed import RoutedMethod, RoutedOptions
from delo_llava.methods.base import Past, Stage

#: Maps beside every pair: the two gates, and what weighs the two experts' outputs.
VISUAL, INSTRUCTION, FUSE_VISUAL, FUSE_INSTRUCTION = (
    "visual",
    "instruction",
    "fuse_visual",
    "fuse_instruction",
)


class SmoLoraOptions(RoutedOptions):
    """Options of SMoLoRA.

    Attributes:
        experts: of each kind; with those of the other kind they share the rank, which is a multiple of twice
            their number.
        gate: `ste` lets the gates learn by the gradient of their softmax, at the same function; `none` leaves
            them as they were drawn, as the released code does without saying so.
        linears: which linears of the language layers have adapters; the paper's are those of the `mlp`.
    """

    experts: int = Field(4, ge=2)
    gate: Literal["ste", "none"] = "ste"
    linears: Linears = "mlp"


class SmoLora(RoutedMethod):
    """Separable routing: one expert by what a layer sees of a sample, one by the words of its instruction."""

    Config = SmoLoraOptions

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.multiple = 2 * options.experts
        if options.rank != "match" and options.rank % self.multiple:
            raise DeloError(
                "The rank must be a multiple of the number of experts of both kinds, who share it",
                given=f"rank={options.rank}, experts={options.experts}",
                fix="set rank to twice experts times the rank of one",
            )

    def config(self, base: nn.Module) -> LowRankConfig:
        found = super().config(base)
        experts = self.options.experts
        found.heads = {
            VISUAL: ["in", experts], INSTRUCTION: [self.width(base), experts],
            FUSE_VISUAL: ["out", 1], FUSE_INSTRUCTION: ["out", 1],
        }  # fmt: skip
        return found

    def besides(self, base: nn.Module) -> int:
        experts, linears = self.options.experts, self.placed(base)
        gates = sum(experts * (inputs + self.width(base)) for inputs, _ in linears.values())
        fuses = 2 * sum(outputs for _, outputs in linears.values())
        return fuses + (gates if self.options.gate == "ste" else 0)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        model = self.continued(base, stage.past) if stage.past else self.fresh(base, ADAPTER)
        if self.options.gate == "none":
            for name, parameter in model.named_parameters():
                if f".{ADAPTER}.{VISUAL}." in name or f".{ADAPTER}.{INSTRUCTION}." in name:
                    parameter.requires_grad_(False)
        return mixed(model, self.mix, by_instruction)  # type: ignore[no-any-return]

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        model = self.opened(base, past, only_last=True)
        return mixed(model, self.mix, by_instruction)  # type: ignore[no-any-return]

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """a·u + b·v for every token."""
        plan: RowPlan = layer.carrier.current()
        visual = at_prefill(layer, plan, lambda: self._gate(layer, VISUAL, instance_means(layer, x, plan)))
        words = plan.of(layer, plan.values[INSTRUCTION])
        asked = self._gate(layer, INSTRUCTION, words)
        seen, told = layer.down(ADAPTER, x).chunk(2, dim=-1)
        seen, told = (weighted(u, plan.spread(layer, g, x)) for u, g in ((seen, visual), (told, asked)))
        u = layer.up(ADAPTER, torch.cat([seen, torch.zeros_like(told)], -1))
        v = layer.up(ADAPTER, torch.cat([torch.zeros_like(seen), told], -1))
        scores = [layer.head(ADAPTER, FUSE_VISUAL, u), layer.head(ADAPTER, FUSE_INSTRUCTION, v)]
        a, b = torch.cat(scores, -1).softmax(-1).split(1, dim=-1)
        added: Tensor = a * u + b * v
        return added

    def _gate(self, layer: LowRankLayer, head: str, query: Tensor) -> Tensor:
        """The chosen expert of each of a layer's rows, n×E: one, and zero elsewhere."""
        chosen: Tensor = gates(layer.head(ADAPTER, head, query), 1)
        return chosen if self.options.gate == "ste" else chosen.detach()


def by_instruction(inputs: RouteInputs, queries: Queries) -> RowPlan:
    """What the rows ask for; which experts that means, every layer's gate says."""
    return RowPlan({INSTRUCTION: queries.instruction}, inputs)


METHOD = SmoLora
