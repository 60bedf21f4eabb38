"""`dac`: one LoRA read as a pool of rank-one experts, chosen per sample; the most used ones are kept.

Source: Fa, Duan, Zhang, Qi, Yang, Shi, "Decomposing and Composing" (DAC), AAAI-26 (arXiv 2601.22828).
Per linear and stage t, with experts b_i a_iᵀ, i ≤ r, and a frozen query φ of the sample:

    choice     S = top-k softmax(W_R φ + c₀)                      y = W x + past + s · B[:, S] A[S, :] x
    counts     c_i += 1 for every sample that chose i
    kept       M = top-k' c; the last steps train with S = M      past += s · B[:, M] A[M, :]
    loss       CE + λ · mean over linears of Σ_ij |b_iᵀ b'_j| + |a_iᵀ a'_j|,  i ∈ M now, j kept earlier (AGO)

needs_task: no. Encoders: none, φ is the base's own frozen image feature, or that of the prompt's words where
there is no image. mergeable: yes, answers need no routing. Bytes per task: 4·k'·Σ(d_in + d_out).

Simplified: written for CLIP's two towers, here for a generative model. Left out of the released code on
purpose: a batch-wide vote (its function depends on the batch; choices are per sample here), a router that
never learns (`router=frozen_random` is that one), routing by a first token that is the same for every text,
orthogonality to past experts that were not kept, merging four experts of a function trained with eight (here
the kept ones are trained alone at the end), counts that no checkpoint holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.adapters.carrier import find_carrier, routing
from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, RowPlan, lowrank, mixed, sum_of
from delo_llava.adapters.store import write_adapter
from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.files import write_json_atomic
from delo_llava.methods._accumulated import AccumulatedMethod
from delo_llava.methods._lowrank import LowRankOptions, lowrank_config
from delo_llava.methods.base import (
    Capabilities,
    Clock,
    Passes,
    Prompt,
    Reduce,
    Stage,
    Trained,
    answer_logits,
    answer_loss_sum,
)
from delo_llava.methods.delo.router import top_factors

#: What a stage counted and kept: linear -> `counts` of its experts and the positions `kept`.
EXPERTS = "experts.json"


class DacOptions(LowRankOptions):
    """Options of DAC; symbols of the paper in brackets.

    Attributes:
        rank: experts of a linear [r; 12 in the paper], or `match`: as many as make a stage's trainable
            parameters, its router's among them, come nearest to those of the method `like`.
        like: a method's name.
        alpha_over_rank: the update is scaled by this factor [s].
        dropout: on the experts' input, while training.
        active: share of the experts that are chosen for a sample [k = 8 of 12].
        kept: share of the experts that outlast the stage [k' = 4 of 12].
        router: `ste` learns to choose, by a straight-through gradient; `frozen_random` is drawn once and
            stays, as the released code's does.
        latent: width of the router's projection of a query, shared by all linears.
        ago: weight of the orthogonality to what earlier stages kept [lambda].
        ago_sides: which factors of the experts it keeps apart; the paper has B alone.
        uncounted: share of the steps at the beginning whose choices are not counted.
        settled: share of the steps at the end in which the kept experts alone are trained.
    """

    active: float = Field(2 / 3, gt=0, le=1)
    kept: float = Field(1 / 3, gt=0, le=1)
    router: Literal["ste", "frozen_random"] = "ste"
    latent: int = Field(64, ge=1)
    ago: float = Field(0.1, ge=0)
    ago_sides: tuple[Literal["A", "B"], ...] = ("A", "B")
    uncounted: float = Field(0.1, ge=0, lt=1)
    settled: float = Field(0.2, ge=0, lt=1)


class ExpertRouter(nn.Module):
    """Which experts of every linear act for a sample, from its query alone.

    All parameters are direct members, so that ZeRO-3 gathers them together.

    Args:
        hidden: d, length of a query; latent: width of the projection that all linears share.
        linears, experts: L and r.
    """

    def __init__(self, hidden: int, latent: int, linears: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        # Unit queries times N(0, 1) rows: latents and scores start with variance one.
        self.down = nn.Parameter(torch.randn(latent, hidden))
        self.head = nn.Parameter(torch.randn(linears * experts, latent) * latent**-0.5)
        self.bias = nn.Parameter(torch.zeros(linears * experts))

    def forward(self, query: Tensor, active: int, settled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gates and the choice of every row.

        Args:
            query: R×d.
            active: k, experts chosen of each linear.
            settled: float L×r of ones and zeros that is taken instead of a choice; the router then gets a
                gradient of zero (ZeRO-3 would otherwise update it by an old one).

        Returns:
            fp32 R×L×r, whose values are exactly one and zero and whose gradient reaches the scores of chosen
            experts; and bool R×L×r.
        """
        # float64: near-ties must not fall with the shape of the batch.
        latent = F.linear(query.double(), self.down.double())
        scores = F.linear(latent, self.head.double(), self.bias.double())
        share = scores.view(len(query), -1, self.experts).softmax(-1)
        slope = share - share.detach()
        if settled is None:
            chosen = torch.zeros_like(share).scatter(-1, top_factors(share.detach(), active), 1.0)
        else:
            chosen, slope = settled.double().expand_as(share), slope * 0.0
        return (chosen * (1.0 + slope)).float(), chosen.bool()


@dataclass(frozen=True)
class KeptExperts:
    """What a finished stage's layers add: what is stored, with the same bits as when it is read again.

    Attributes:
        kept: linear -> positions of the kept experts; config: of the narrow pair that they make.
    """

    stage: str
    kept: Mapping[str, Tensor]
    config: LowRankConfig

    def __call__(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """A mixer."""
        a, b = layer.pair(self.stage)
        kept = self.kept[layer.name].to(a.device)
        u = F.linear(layer.dropout(x.to(torch.float32)), a[kept])
        own = F.linear(u, b[:, kept]) * (self.config.alpha / self.config.r)
        return _beside_earlier(layer, self.stage, x, own)


class Dac(AccumulatedMethod):
    """Rank-one experts over a frozen base; a stage adds the ones that were used most to what answers."""

    capabilities = Capabilities(mergeable=True)
    Config = DacOptions

    def __init__(self, options: DacOptions, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.options: DacOptions = options
        self._stage = ""
        self._names: list[str] = []
        self._counts = self._pending = self._before = torch.zeros(0)
        self._settled, self._kept = False, dict[str, Tensor]()
        self._seen: Tensor | None = None

    # ---- sizes
    def config(self, base: nn.Module) -> LowRankConfig:
        learned = self.options.router == "ste"
        besides = self.options.latent * self.backbone.hidden_size(base) * learned
        each = len(adapted_linears(base, self.backbone)) * (self.options.latent + 1) * learned
        return lowrank_config(self.options, base, self.backbone, self.run, 1, 0, besides, each)

    def _of(self, share: float) -> int:
        """Number of experts in a share of all."""
        return max(1, round(share * self._router.experts))

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> Any:
        model = mixed(super().begin(base, stage), self._by_row, self._decide)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLayer)}
        self._stage, self._names = stage.name, [layer.name for layer in layers.values()]
        self._earlier = {n: _earlier_experts(layer, stage.name) for n, layer in layers.items()}
        config: LowRankConfig = model.peft_config[stage.name]
        self._router = ExpertRouter(config.hidden_size, self.options.latent, len(layers), config.r)
        self._router.to(next(iter(layers.values())).pair(stage.name)[0].device)
        self._router.requires_grad_(self.options.router == "ste")
        lowrank(model).add_module("dac_router", self._router)
        self._counts = torch.zeros(len(layers), config.r, dtype=torch.int64)
        self._pending, self._settled, self._kept = torch.zeros_like(self._counts), False, {}
        return model

    def _decide(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        """The experts of every row, by its own query."""
        settled = self._keep_mask().to(queries.image.device) if self._settled else None
        active = self._of(self.options.active)
        gates, chosen = self._router(guide(queries, inputs.presence), active, settled)
        return RowPlan(dict(zip(self._names, gates.unbind(1), strict=True)), inputs, {"chosen": chosen})

    def _by_row(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """Training: what earlier stages kept, and the row's experts."""
        plan: RowPlan = layer.carrier.current()
        u = layer.down(self._stage, x)
        return _beside_earlier(
            layer, self._stage, x, layer.up(self._stage, u * plan.at(layer, layer.name, u))
        )

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        with routing(model, RouteInputs.from_batch(batch)) as route:
            logits = answer_logits(model, batch)
        # Kept for after_backward: a forward may run twice under checkpointing and must not count anything.
        self._seen = route.plan.extra["chosen"]
        return {"answer": answer_loss_sum(logits, batch.labels)}

    # ---- counts and phases
    def _phases(self, steps: int) -> tuple[int, int]:
        """The first step whose choices count, and the first that trains the kept experts alone."""
        last = max(1, round(self.options.settled * steps)) if self.options.settled else 0
        settled = max(1, steps - last)
        return min(int(self.options.uncounted * steps), settled - 1), settled

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        first, settled = self._phases(clock.steps)
        if self._seen is not None and first <= clock.step < settled:
            self._pending += self._seen.sum(0).cpu()
        self._seen = None

    def before_step(self, trained: Trained, clock: Clock) -> None:
        """All ranks' choices since the last update are counted, and the next step may be a settled one."""
        self._before = self._counts
        self._counts = self._counts + trained.sum(self._pending)
        self._pending = torch.zeros_like(self._counts)
        self._settled = clock.step + 1 >= self._phases(clock.steps)[1]

    def left_out(self, clock: Clock) -> None:
        self._counts = self._before

    def _keep(self) -> Tensor:
        """Positions of the most used experts, L×k'; of equals the first ones."""
        return top_factors(self._counts, self._of(self.options.kept)).sort(-1).values

    def _keep_mask(self) -> Tensor:
        return torch.zeros(self._counts.shape).scatter(-1, self._keep(), 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self._counts, "settled": torch.tensor(self._settled)}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self._counts, self._settled = state["counts"].clone(), bool(state["settled"])

    # ---- orthogonality
    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | ({"ago": self.options.ago} if self.options.ago else {})

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """Nothing before there are earlier stages and counted choices: without counts no expert is a key
        one.
        """
        known = any(sides for sides in self._earlier.values())
        if not self.options.ago or not known or not self._counts.any():
            return {}
        terms = []
        for (name, earlier), kept in zip(self._earlier.items(), self._keep(), strict=True):
            for side in self.options.ago_sides:
                now = values[f"{name}.lowrank_{side}.{self._stage}.weight"]
                now = now[kept] if side == "A" else now[:, kept].T
                terms.append(overlap(now, earlier[side].to(now)))
        return {"ago": torch.stack(terms).sum() / len(self._earlier)}

    # ---- what is kept
    def finish(self, model: Any, passes: Passes, reduce: Reduce) -> None:
        self._kept = dict(zip(self._names, self._keep(), strict=True))
        mixed(
            model, KeptExperts(self._stage, self._kept, _narrow(model.peft_config[self._stage], self._kept))
        )

    def tensors(self, model: Any, stage: Stage) -> dict[str, Tensor]:
        """The kept experts alone."""
        found = {}
        for key, tensor in super().tensors(model, stage).items():
            name, pair, side = key.removeprefix("base_model.model.").rpartition(".lowrank_")
            if pair:  # not the router
                kept = self._kept[name].to(tensor.device)
                found[key] = tensor[kept] if side == "A.weight" else tensor[:, kept]
        return found

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        config = _narrow(model.peft_config[stage.name], self._kept)
        write_adapter(self.tensors(model, stage), config, folder)
        pairs = zip(self._names, self._counts.tolist(), self._keep().tolist(), strict=True)
        facts = {name: {"counts": counts, "kept": kept} for name, counts, kept in pairs}
        write_json_atomic(folder / EXPERTS, facts)

    # ---- answers
    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        """Nothing is routed, but inside a stage."""
        carrier = find_carrier(model)
        if carrier is None or not carrier.enabled():
            yield Prompt.of(batch)
            return
        with routing(model, RouteInputs.from_batch(batch, expand=beams)):
            yield Prompt.of(batch)


def guide(queries: Queries, presence: Tensor) -> Tensor:
    """What a sample's experts are chosen by, R×d: its image's query where it has one, else its prompt's
    words.
    """
    words = F.normalize(queries.text + queries.instruction, dim=-1)
    return torch.where(presence[:, :1].to(words.device), queries.image, words)


def overlap(now: Tensor, earlier: Tensor) -> Tensor:
    """Σ_ij |u_iᵀ v_j| of rows u (m×d) and v (n×d): never negative, and zero only where all are orthogonal (a
    mean of signed products can fall without end).
    """
    return (now @ earlier.T).abs().sum()


def _beside_earlier(layer: LowRankLayer, stage: str, x: Tensor, own: Tensor) -> Tensor:
    """A stage's own addition with that of the stages before it."""
    earlier = [name for name in layer.active_adapters if name != stage]
    return sum_of(layer, earlier, x) + own if earlier else own


def _narrow(config: LowRankConfig, kept: Mapping[str, Tensor]) -> LowRankConfig:
    """The configuration of the kept experts alone, of the same scale."""
    rank = len(next(iter(kept.values())))
    return replace(config, r=rank, alpha=config.alpha / config.r * rank)


def _earlier_experts(layer: LowRankLayer, stage: str) -> dict[str, Tensor]:
    """Copies of what earlier stages kept in a linear, as rows: side -> n×d; empty in the first stage."""
    earlier = [name for name in layer.lowrank_A if name != stage]
    if not earlier:
        return {}
    a, b = zip(*(layer.pair(name) for name in earlier), strict=True)
    return {"A": torch.cat(a).detach().clone(), "B": torch.cat(b, dim=1).T.detach().clone()}


METHOD = Dac
