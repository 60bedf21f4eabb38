"""`same`: experts that share a pair and a router through all tasks; updates are bent by what inputs were.

Source: SAME (ICML 2026, arXiv 2602.01990); specification: newer_methods, section 1, whose equations are read
from a port. With E experts of rank ρ = r/E, one of which is task t's own, a row's weights p̄ (a mean over its
prompt's tokens), and a mask m of the experts that act:

    training   y = W₀x + s·(Σ_j g_j B_j)(Σ_i g_i A_i) x,   p = softmax(R x),  g = p̄ ∘ m / Σ(p̄ ∘ m)
    at test    the same with p = softmax(R x / E) and the `top_k` largest of p̄ in m's place
    m_e = 0 where minmax(u)_e − minmax(v)_e < τ, but for the own expert:  u a running mean of p̄, v of p‖x‖²
    ΔA ← ΔA U diag(1/(S + μ)) Uᵀ + ΔA(I − UUᵀ)/μ       U, S: what earlier tasks' inputs vary in, and how far
    ΔR ← ΔR scaled by 0.8 to 1 along the widest directions of all inputs so far, the widest least

needs_task: no. encoders: none. mergeable: no. Bytes per task: nothing is added; one adapter and, for every
linear, 4·(k + 1)·d_in of sums for all tasks.

simplified, by the specification's rule for ports: weights are a row's and not a batch's; the covariance is
summed over all tasks, in one random projection of k directions, where the port has that of one micro-batch of
the last task and none at all in the router; experts are not masked in a stage's first steps. Maps act on the
update: on a gradient, Adam undoes most of them. A masked expert keeps its bits.
Not reproduced: a mask that drops all experts but the own one at the first forward, so that the router never
learns (T1; with tokens of equal length it does so after the first steps still: `threshold` decides, and what
acted is in `experts.json`); directions that are arbitrary where tokens are few (T5).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer, RowPlan, mixed
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.data.examples import Examples
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.files import write_json_atomic
from delo_llava.methods._experts import check_experts, largest
from delo_llava.methods._instances import at_prefill, instance_means
from delo_llava.methods._linears import Linears
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods._routed import RoutedMethod, RoutedOptions
from delo_llava.methods._same import Moments, Spectrum, acting, curved, probe, spectral
from delo_llava.methods.base import (
    SUMMED,
    Capabilities,
    Clock,
    Footprint,
    Passes,
    Past,
    Reduce,
    Stage,
    Trained,
)
from delo_llava.strict import read_tensors

COVARIANCE, EXPERTS = "covariance.safetensors", "experts.json"
#: Standard deviation of A at the start.
SPREAD = 0.01
#: Share of the past in the running means of a stage's steps.
DECAY = 0.95
#: A plan's only value: nothing is decided for rows before the layers see them.
ROWS = "rows"


class SameOptions(RoutedOptions):
    """Options of SAME; symbols of the paper in brackets.

    Attributes:
        experts: that share the rank of each pair [E], one for each task; later tasks share the last one.
        top_k: experts that act on a sample at test.
        threshold: an expert acts in training where its share of the rows is larger than its share of the
            inputs' energy by this [τ].
        warmup: share of a stage's first steps in which all experts act.
        directions: of the inputs' covariance that are kept for every linear [k].
        damping: spread at which an update is half as long as where nothing spreads [μ].
        refresh: steps after which the router's directions are made anew.
        linears: which linears of the language layers have adapters; the paper's are those of the `mlp`.
        projector: whether the projector's linears have adapters, too; the paper's have none.
    """

    experts: int = Field(8, ge=2)
    top_k: int = Field(2, ge=1)
    threshold: float = Field(0.1, ge=-1, le=1)
    warmup: float = Field(0.1, ge=0, le=1)
    directions: int = Field(64, ge=1)
    damping: float = Field(0.9, gt=0)
    refresh: int = Field(20, ge=1)
    linears: Linears = "mlp"
    projector: bool = False


class Same(RoutedMethod):
    """A spectral map for the router, a curved one for A, a mask over experts."""

    Config = SameOptions
    capabilities = Capabilities(answers_as_trained=False)
    #: Of every adapted linear, in the model's order: its path among the modules -> its name in the base.
    _paths: dict[str, str]
    #: Inputs of earlier tasks, and this rank's part of this one's.
    _earlier: dict[str, Moments]
    _moments: dict[str, Moments]
    #: Of earlier inputs, and of all so far at the last refresh.
    _past: dict[str, Spectrum]
    _all: dict[str, Spectrum]
    #: u and v, L×E each, and how often the own expert was chosen of how many rows, L×2.
    _load: Tensor
    _energy: Tensor
    _chosen: Tensor
    _masks: Tensor

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.multiple = self.outputs = options.experts
        check_experts(options)
        self._own, self._probes = 0, dict[str, Tensor]()
        self._real: Tensor
        self._forward()

    def _forward(self) -> None:
        """Nothing was seen of a step yet: `_seen` is a forward's, the others are the step's."""
        self._seen: dict[str, tuple[Tensor, Moments]] = {}
        self._stepped: dict[str, Moments] = {}
        self._counted: dict[str, Tensor] = {}

    def remarks(self, own: Mapping[str, Examples]) -> list[str]:
        shared = list(own)[self.options.experts - 1 :]
        told = f"same.experts={self.options.experts}: {', '.join(shared)} share the last expert"
        return [told] if len(shared) > 1 else []

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        model = self.continued(base, stage.past) if stage.past else self.fresh(base, ADAPTER)
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LowRankLayer)}
        if not stage.past:
            for layer in layers.values():
                nn.init.normal_(layer.pair(ADAPTER)[0], std=SPREAD)
        self._own = min(stage.index, self.options.experts - 1)
        self._paths = {path: layer.name for path, layer in layers.items()}
        sizes, width = {layer.name: layer.in_features for layer in layers.values()}, self.options.directions
        self._moments = {name: Moments.empty(size, width) for name, size in sizes.items()}
        self._earlier = _read(list(stage.past.values())[-1].folder) if stage.past else {}
        self._probes = {}
        self._sizes = sizes
        self._past = {name: known.spectrum(self._probe(name)) for name, known in self._earlier.items()}
        self._all = dict(self._past)
        shape = (len(sizes), self.options.experts)
        self._load, self._energy = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self._masks = torch.ones(shape, dtype=torch.bool)
        self._chosen = torch.zeros(len(sizes), 2, dtype=torch.float64)
        self._forward()
        return mixed(model, self.mix, undecided)  # type: ignore[no-any-return]

    def _probe(self, name: str) -> Tensor:
        """A linear's, the same in every stage, so that sums of all stages belong together."""
        if name not in self._probes:
            seed = self.run.seed + list(self._sizes).index(name)
            self._probes[name] = probe(self._sizes[name], self.options.directions, seed)
        return self._probes[name]

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self._real = batch.inputs["attention_mask"].bool()
        return super().loss_sums(model, batch)

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        """Take over what the layers saw of this micro-batch; a forward may run twice and adds nothing."""
        for name, (counted, moments) in self._seen.items():
            self._counted[name] = self._counted.get(name, 0) + counted.double().cpu()
            if name in self._stepped:
                self._stepped[name].add(moments)
            else:
                self._stepped[name] = moments
        self._seen = {}

    def left_out(self, clock: Clock) -> None:
        self._forward()

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        """Bend the update; then count the step, for the mask and the directions of the next ones."""
        trained.rewrite(self._bent(before, trained.values()))
        self._count(trained, clock)
        if (clock.step + 1) % self.options.refresh == 0:
            self._all = {
                name: self._whole(name, trained.sum).spectrum(self._probe(name)) for name in self._sizes
            }

    def _bent(self, before: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of the trained parameters is not as the optimiser left it."""
        new, size = {}, 0
        for (path, linear), mask in zip(self._paths.items(), self._masks, strict=True):
            a, b, router = (f"{path}.lowrank_{part}.{ADAPTER}.weight" for part in "ABR")
            size = len(values[a]) // len(mask)
            blocks = mask.repeat_interleave(size).to(values[a])
            change = values[a] - before[a]
            if linear in self._past:
                change = curved(change, self._past[linear], self.options.damping)
            if linear in self._past or not bool(mask.all()):
                new[a] = before[a] + blocks.unsqueeze(1) * change
            if not bool(mask.all()):
                new[b] = before[b] + blocks * (values[b] - before[b])
            if linear in self._all:
                new[router] = before[router] + spectral(values[router] - before[router], self._all[linear])
        return new

    def _count(self, trained: Trained, clock: Clock) -> None:
        """Running means of the step's rows over all ranks, and which experts act in the next one."""
        experts, nothing = (
            self.options.experts,
            torch.zeros(2 * self.options.experts + 2, dtype=torch.float64),
        )
        summed = trained.sum(torch.stack([self._counted.get(name, nothing) for name in self._sizes]))
        for name, moments in self._stepped.items():
            self._moments[name].add(moments)
        self._forward()
        rows = summed[:, -1:]
        means = summed[:, :-2] / rows.clamp(min=1)
        for running, mean in ((self._load, means[:, :experts]), (self._energy, means[:, experts:])):
            running.copy_(torch.where(rows > 0, DECAY * running + (1 - DECAY) * mean, running))
        self._chosen += summed[:, -2:]
        if clock.step + 1 >= self.options.warmup * clock.steps:
            self._masks = acting(self._load, self._energy, self._own, self.options.threshold)

    def _whole(self, name: str, reduce: Reduce) -> Moments:
        """A linear's inputs of earlier tasks and of this one so far, of all ranks."""
        mine = self._moments[name].tensors()
        found = Moments(**{key: reduce(tensor) for key, tensor in mine.items()})
        if name in self._earlier:
            found.add(self._earlier[name])
        return found

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        self._moments = {name: self._whole(name, reduce) for name in self._sizes}

    # ---- what is kept
    def state_dict(self) -> dict[str, Tensor]:
        state = {"load": self._load, "energy": self._energy, "chosen": self._chosen, "masks": self._masks}
        for name, moments in self._moments.items():
            state |= {f"{SUMMED}{key}/{name}": tensor for key, tensor in moments.tensors().items()}
        for name, spectrum in self._all.items():
            state |= {f"{key}/{name}": tensor for key, tensor in spectrum._asdict().items()}
        return state

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self._load, self._energy = state["load"].clone(), state["energy"].clone()
        self._chosen, self._masks = state["chosen"].clone(), state["masks"].clone()
        for name in self._sizes:
            mine = {key: state[f"{SUMMED}{key}/{name}"] for key in ("products", "sums", "count")}
            self._moments[name] = Moments(**mine)
            if f"directions/{name}" in state:
                self._all[name] = Spectrum(*(state[f"{key}/{name}"] for key in Spectrum._fields))

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        kept = {n: {k: t.float().cpu() for k, t in m.tensors().items()} for n, m in self._moments.items()}
        save_file(
            {f"{key}/{name}": t for name, sums in kept.items() for key, t in sums.items()},
            folder / COVARIANCE,
        )
        share = self._chosen[:, 0] / self._chosen[:, 1].clamp(min=1)
        rows = zip(self._sizes, self._masks, share.tolist(), strict=True)
        told = {
            name: {"acting": mask.nonzero()[:, 0].tolist(), "chosen": found} for name, mask, found in rows
        }
        write_json_atomic(folder / EXPERTS, {"own": self._own, "linears": told})

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        return mixed(self.opened(base, past, only_last=True), self.answer, undecided)  # type: ignore[no-any-return]

    def footprint(self, base: nn.Module) -> Footprint:
        """The experts share one adapter; what is kept of the inputs is fp32."""
        found = super().footprint(base)
        return replace(
            found,
            stored_bytes=sum(4 * m.products.numel() + 4 * len(m.sums) + 4 for m in self._moments.values()),
        )

    # ---- routing
    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """What training adds, all experts that act by their weights."""
        plan: RowPlan = layer.carrier.current()
        scores = layer.scores(ADAPTER, x)
        weights = scores.softmax(-1)
        means = instance_means(layer, weights, plan)
        if torch.is_grad_enabled():
            self._note(layer, x, scores, means, plan)
        mask = self._masks[list(self._sizes).index(layer.name)].to(x.device)
        return crossed(layer, x, plan, shared(means, mask))

    def answer(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """What the largest experts of a row add, chosen at the prefill."""
        plan: RowPlan = layer.carrier.current()
        gate = at_prefill(layer, plan, lambda: self._answering(layer, layer.scores(ADAPTER, x), plan))
        return crossed(layer, x, plan, gate)

    def _answering(self, layer: LowRankLayer, scores: Tensor, plan: RowPlan) -> Tensor:
        means = instance_means(layer, (scores / self.options.experts).softmax(-1), plan)
        return shared(means, largest(means, self.options.top_k))

    @torch.no_grad()
    def _note(self, layer: LowRankLayer, x: Tensor, scores: Tensor, means: Tensor, plan: RowPlan) -> None:
        """What this forward shows of the experts' load and of the inputs; a dummy image counts as none."""
        energy = scores.softmax(-1) * x.float().square().sum(-1, keepdim=True)
        energies = instance_means(layer, energy, plan)
        answers = self._answering(layer, scores, plan)[:, self._own] > 0
        if layer.projector:
            shown = plan.inputs.presence[plan.inputs.image_rows, 0]
            units = torch.tensor(plan.inputs.image_lengths(x[..., 0].numel()), device=x.device)
            tokens = x.flatten(0, -2)[shown.repeat_interleave(units)]
        else:
            shown, tokens = torch.ones_like(answers), x.reshape(-1, x.shape[-1])[self._real.flatten()]
        sums = [part[shown].sum(0) for part in (means, energies)]
        counted = torch.cat([*sums, (answers & shown).sum().view(1), shown.sum().view(1)])
        self._seen[layer.name] = counted, Moments.of(tokens, self._probe(layer.name))


def undecided(inputs: RouteInputs, queries: Queries) -> RowPlan:
    """Every layer weighs its experts itself."""
    return RowPlan({ROWS: inputs.presence}, inputs)


def shared(means: Tensor, mask: Tensor) -> Tensor:
    """Mean weights n×E of those experts that act, which sum to one."""
    kept = means * mask
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def crossed(layer: LowRankLayer, x: Tensor, plan: RowPlan, gate: Tensor) -> Tensor:
    """s·(Σ_j g_j B_j)(Σ_i g_i A_i) x, of rank ρ, by the weights n×E of a layer's rows."""
    weights = plan.spread(layer, gate, x).unsqueeze(-1)
    narrow = layer.down(ADAPTER, x).unflatten(-1, (gate.shape[-1], -1))
    summed = (narrow * weights).sum(-2, keepdim=True)
    return layer.up(ADAPTER, (summed * weights).flatten(-2))


def _read(folder: Path) -> dict[str, Moments]:
    """The inputs of all tasks up to a finished one, by the names of the linears."""
    kept = read_tensors(folder / COVARIANCE, "The covariance of earlier inputs")
    names = [key.removeprefix("count/") for key in kept if key.startswith("count/")]
    parts = ("products", "sums", "count")
    return {name: Moments(*(kept[f"{part}/{name}"].double() for part in parts)) for name in names}


METHOD = Same
