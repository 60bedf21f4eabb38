"""`cram`: a small slot for each task, found in a larger buffer; a sample's slots weigh by their centroids.

Paper: CRAM (arXiv 2606.02502); specification 2 of newer_methods. Slots k of a task's group act together:

    y = W₀x + s·Σ_{k∈group} π_k B_k A_k x,   π = softmax_k(−‖q − c_k‖² / 2σ²),   a c_k for each linear
    (i)   the first steps train a buffer alone: y = W₀x + s·B_b A_b x
    (ii)  s·B_b A_b = UΣVᵀ; strong directions that the group's earlier slots do not read become the slot:
          A = √Σ Vᵀ with V projected off Q and normalised, B = U√Σ/s; Q: orthonormal rows of the earlier A's
    (iii) slot and centroid train with the answer's loss and λ·mean over linears of ‖A Q‖²

q: the frozen image query of a sample; without an image its group's slots weigh alike. Group: by z, a layer
norm of the instruction's query: the nearest prototype at test; in training the task's, chosen once from the
mean of its samples.

needs_task: no. encoders: the paper's CLIP by `encoder=FOLDER`; the base's own frozen features by default.
mergeable: no. Bytes per task: 4·(r·(d_in + d_out) + d) per linear and 8·(d + 2); the buffer is not kept.

simplified: L_dec acts on the slot's rows, where the paper's code projects outputs of one linear on a basis of
another's inputs (T3). q is of length one, so the default σ is smaller than the paper's 2. Not reproduced
from the released code: features and groups of whole batches (T1; `transductive` restores them), the scale
that is applied twice at the switch (T2), refilling with directions that are not new (T4), the group of rank
0's first micro-batch (T5); older slots are frozen, not masked (T6).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, RowPlan, lowrank, mixed
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._cram import Cut, basis_of, centred, group_of, slot_of
from delo_llava.methods._linears import Linears
from delo_llava.methods._lowrank import activate
from delo_llava.methods._routed import RoutedMethod, RoutedOptions
from delo_llava.methods.base import Capabilities, Clock, Passes, Past, Reduce, Stage, Trained
from delo_llava.strict import read_tensors

FILE = "group.safetensors"
#: The adapter that is cut down to a slot.
BUFFER = "the-buffer"
CENTROID = "centroid"
#: What a plan holds: whether a slot is of a row's group (R×T), the row's image query, the slots' tasks.
SLOTS, QUERY, USED = "slots", "query", "used"


class CramOptions(RoutedOptions):
    """Options of CRAM; symbols of the paper in brackets.

    Attributes:
        rank: of the buffer; `match` matches buffer, slot and centroids to what `like` trains.
        slot_rank: of a slot at most.
        least_rank: directions that a slot has at least, as far as the buffer has them.
        warmup: share of a stage's steps that train the buffer.
        strength: singular values up to this do not enter a slot.
        novelty: share of a direction that must lie outside what the group's earlier slots read.
        spread: of the weights' softmax [σ], for queries of length one.
        decorrelation: weight of the penalty on reading what earlier slots read [λ].
        join: cosine above which the second task joins the first one's group.
        margin: by which the nearest group must be nearer than the next one to be joined.
        groups: of tasks at most.
        linears: which linears of the language layers have adapters; the paper's are those of `attention`.
        transductive: take the mean of a batch's queries for every row, as the released code does.
    """

    rank: Literal["match"] | int = 48
    slot_rank: int = Field(9, ge=1)
    least_rank: int = Field(4, ge=1)
    warmup: float = Field(0.05, gt=0, lt=1)
    strength: float = Field(0.08, ge=0)
    novelty: float = Field(0.99, ge=0, le=1)
    spread: float = Field(0.2, gt=0)
    decorrelation: float = Field(1.0, ge=0)
    join: float = Field(0.8, ge=-1, le=1)
    margin: float = Field(0.1, ge=0)
    groups: int = Field(5, ge=1)
    linears: Linears = "attention"
    transductive: bool = False


class Cram(RoutedMethod):
    """Buffer, cut, slot."""

    Config = CramOptions
    capabilities = Capabilities(answers_as_trained=False)
    _name, _width = "", 0
    #: Of every trained task, in order: its group; sums of z and their number (the last one: this task's).
    _groups: dict[str, int]
    _sums: dict[str, Tensor]
    #: Linear -> A of every earlier task, on the CPU.
    _reads: dict[str, dict[str, Tensor]]

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.capabilities = replace(self.capabilities, transductive=options.transductive)
        self._groups, self._sums, self._reads, self._switched = {}, {}, {}, True
        self._where: dict[str, str] = {}

    def config(self, base: nn.Module) -> LowRankConfig:
        """Of a slot, whose rank does not depend on the buffer's."""
        rank, found = self.options.slot_rank, super().config(base)
        heads: dict[str, list[int | str]] = {CENTROID: [self.width(base), 1, "distance"]}
        return replace(found, r=rank, alpha=self.options.alpha_over_rank * rank, heads=heads)

    def besides(self, base: nn.Module) -> int:
        linears, rank = self.placed(base), int(self.options.slot_rank)
        return rank * sum(map(sum, linears.values())) + len(linears) * self.width(base)

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._read(stage.past)
        self._groups[stage.name] = len(self._groups)  # until `prepare` finds it, a group of its own
        self._name, self._width, self._switched = stage.name, self.width(base), False
        buffer = super().config(base)
        model = self.beside(base, stage.past, stage.name)
        model.add_adapter(BUFFER, buffer)
        activate(model, [*stage.past, stage.name, BUFFER], train=[stage.name, BUFFER])
        self._reads = {
            layer.name: {task: _down(layer, task).detach().cpu().clone() for task in stage.past}
            for layer in _layers(model)
        }
        return mixed(model, self.mix, self.of_task)  # type: ignore[no-any-return]

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """The task's group, and its centroids at the mean of its image queries."""
        # Of z and of image queries; the last entry is how many.
        sums = torch.zeros(2, self._width + 1, dtype=torch.float64)
        for batch in passes.all():
            queries = frozen_queries(model, self.inputs(batch), batch.inputs)
            rows = centred(queries.instruction).double().cpu(), queries.image.double().cpu()
            for i, (values, seen) in enumerate(zip(rows, (None, batch.presence[:, 0].cpu()), strict=True)):
                kept = values if seen is None else values[seen]
                sums[i] += torch.cat([kept.sum(0), kept.new_tensor([len(kept)])])
        text, image = reduce(sums)
        options, mean = self.options, text[:-1] / text[-1].clamp(min=1)
        group = group_of(mean, self._prototypes(), options.join, options.margin, options.groups)
        self._groups[self._name], self._sums[self._name] = group, text
        for layer in _layers(model):
            with torch.no_grad():
                _centroid(layer, self._name).copy_((image[:-1] / image[-1].clamp(min=1)).unsqueeze(0))

    def state_dict(self) -> dict[str, Tensor]:
        told = torch.tensor([self._groups.get(self._name, 0), int(self._switched)])
        return {"told": told, "text": self._sums.get(self._name, torch.zeros(0))}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self._groups[self._name], switched = (int(v) for v in state["told"])
        self._switched = bool(switched)
        self._sums[self._name] = state["text"].clone()

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {"decorrelation": self.options.decorrelation}

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """mean over linears of ‖A Q‖², once there is a slot and the group has earlier ones."""
        bases = self._bases() if self._switched else {}
        terms = [
            (values[name] @ basis.T.to(values[name])).square().sum()
            for linear, basis in bases.items()
            for name in (self._parameter(values, linear, "A", self._name),)
        ]
        return {"decorrelation": torch.stack(terms).mean()} if terms else {}

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        """Once, after the first steps: the buffer is cut down to the slot, whose training begins."""
        if self._switched or clock.step + 1 < math.ceil(self.options.warmup * clock.steps):
            return
        options, values, bases = self.options, trained.values(), self._bases()
        cut = Cut(options.slot_rank, options.least_rank, options.strength, options.novelty)
        new = {}
        for linear in self._reads:
            down, up = (values[self._parameter(values, linear, side, BUFFER)] for side in "AB")
            pair = slot_of(down, up, options.alpha_over_rank, bases.get(linear), cut)
            for side, made in zip("AB", pair, strict=True):
                name = self._parameter(values, linear, side, self._name)
                new[name] = made.to(values[name])
        trained.rewrite(new)
        self._switched = True

    def _parameter(self, values: Mapping[str, Tensor], linear: str, side: str, adapter: str) -> str:
        """The name of a trained parameter, however the model is wrapped."""
        ending = f"{linear}.lowrank_{side}.{adapter}.weight"
        if ending not in self._where:
            self._where[ending] = next(name for name in values if f".{name}".endswith(f".{ending}"))
        return self._where[ending]

    def _bases(self) -> dict[str, Tensor]:
        """Linear -> Q of the earlier slots of this task's group; linears without any are left out."""
        mine = [t for t in self._groups if t != self._name and self._groups[t] == self._groups[self._name]]
        found = {linear: basis_of([downs[t] for t in mine]) for linear, downs in self._reads.items()}
        return {linear: basis for linear, basis in found.items() if basis is not None}

    def _prototypes(self) -> Tensor:
        """Mean z of every group's samples, G×d; a task without sums, whose group is to be found, has no
        part.
        """
        known = {task: group for task, group in self._groups.items() if task in self._sums}
        count = max(known.values(), default=-1) + 1
        sums = [sum(self._sums[task] for task, group in known.items() if group == n) for n in range(count)]
        means = [s[:-1] / s[-1].clamp(min=1) for s in sums if isinstance(s, Tensor)]
        return torch.stack(means) if means else torch.zeros(0, 0, dtype=torch.float64)

    # ---- what is kept
    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        group = torch.tensor(self._groups[stage.name])
        save_file({"group": group, "text": self._sums[stage.name]}, folder / FILE)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        self._read(past)
        self._switched = True
        return mixed(self.opened(base, past), self.mix, self.nearest)  # type: ignore[no-any-return]

    def _read(self, past: Mapping[str, Past]) -> None:
        kept = {name: read_tensors(stage.folder / FILE, "The task's group") for name, stage in past.items()}
        self._groups = {name: int(tensors["group"]) for name, tensors in kept.items()}
        self._sums = {name: tensors["text"] for name, tensors in kept.items()}

    # ---- routing
    def of_task(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        """In training all rows are of the task's group."""
        group = torch.full((len(queries.image),), self._groups[self._name], device=queries.image.device)
        return self._plan(inputs, group, self._queries(queries).image)

    def nearest(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        """Each row is of the group whose prototype is nearest to its z."""
        shared = self._queries(queries)
        prototypes = self._prototypes().to(shared.instruction.device)
        z = centred(shared.instruction).double()
        near = nn.functional.cosine_similarity(z.unsqueeze(1), prototypes.unsqueeze(0), dim=-1).argmax(1)
        return self._plan(inputs, near, shared.image)

    def _plan(self, inputs: RouteInputs, groups: Tensor, query: Tensor) -> RowPlan:
        """The slots of the rows' groups, and which of these any row uses."""
        of = torch.tensor(list(self._groups.values()), device=groups.device)
        slots = groups.unsqueeze(1) == of
        used = slots.any(0)
        names = [task for task, wanted in zip(self._groups, used.tolist(), strict=True) if wanted]
        return RowPlan({SLOTS: slots[:, used], QUERY: query}, inputs, {USED: names})

    def _queries(self, queries: Queries) -> Queries:
        """The rows' own, or as the released code has it, the batch's means."""
        if not self.options.transductive:
            return queries
        means = (q.sum(0, keepdim=True) / (q != 0).any(1).sum().clamp(min=1) for q in queries)
        return Queries(*(mean.expand_as(q) for mean, q in zip(means, queries, strict=True)))

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """Buffer before the switch, slots after it; the other is there with a factor of zero, so that every
        trained parameter has a gradient in every step.
        """
        plan: RowPlan = layer.carrier.current()
        query, slots = (plan.of(layer, plan.values[name]) for name in (QUERY, SLOTS))
        tasks: list[str] = plan.extra[USED]
        far = torch.cat([layer.head(task, CENTROID, query) for task in tasks], -1)
        far = far.masked_fill((query == 0).all(-1, keepdim=True), 0.0)
        weight = (-far / (2 * self.options.spread**2)).masked_fill(~slots, -math.inf).softmax(-1)
        total = torch.zeros((), device=x.device)
        for column, task in enumerate(tasks):
            share = plan.spread(layer, weight[:, column : column + 1], x)
            total = total + layer.up(task, layer.down(task, x) * share)
        if BUFFER not in layer.lowrank_A:
            return total
        buffer = layer.up(BUFFER, layer.down(BUFFER, x))
        return total + 0.0 * buffer if self._switched else 0.0 * total + buffer


def _layers(model: nn.Module) -> list[LowRankLayer]:
    return [layer for part in lowrank(model).layers() for layer in part]


def _down(layer: LowRankLayer, task: str) -> Tensor:
    """A of a slot, whole before an engine begins."""
    module: Any = layer.lowrank_A[task]
    weight: Tensor = module.weight
    return weight


def _centroid(layer: LowRankLayer, task: str) -> Tensor:
    """The centroid of a slot, 1×d."""
    heads: Any = layer.lowrank_H[task]
    weight: Tensor = heads[CENTROID].weight
    return weight


METHOD = Cram
