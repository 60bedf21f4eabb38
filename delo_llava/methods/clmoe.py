"""`clmoe`: low-rank experts weighed by a router of the instance and one of the task, mixed with those before.

Paper: "CL-MoE: Enhancing Multimodal Large Language Model with Dual Momentum Mixture-of-Experts for Continual
Visual Question Answering", CVPR 2025; specification 9 of newer_methods. With n experts of rank r/n in a pair:

    training   y = W₀x + s·Σ_i G^I_i(x̄) B_i A_i x        G^I: the K largest of softmax(R x̄), scaled to sum 1
    at test    y = W₀x + s·Σ_i (β G^I_i(x̄) + (1 − β) G^T_i(τ)) B_i A_i x
    after task t   θ_t = λ θ_{t−1} + (1 − λ) φ_t for every expert's A and B (φ_t: as trained)

x̄: a sample's mean input of the layer over its prompt. G^T(τ): the mean of G^I over task τ's samples. λ is γ
for experts among the K largest of G^T for this task and for an earlier one (shared), 1 − γ where for this one
alone, 1 for all others (they stay as they were). τ: the task whose anchors are nearest.

needs_task: no. encoders: the paper's CLIP by `encoder=FOLDER`; the base's own frozen features by default.
mergeable: no. Bytes per task: 8·n per linear and 3·(d + 1)·8 of anchors; one adapter for all tasks.

simplified: the paper's clusters of prompts are one centre per task. The equations are the specification's
reading of the paper: the released code has neither momentum nor a task router that runs, samples its
statistics when the clock's second is 30, and types its mixture in by hand; rows made with it, or with LAMDA's
port (a plain MoELoRA), are not CL-MoE and not comparable.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer, RowPlan, lowrank, mixed
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.features.task_keys import TaskKeyMemory
from delo_llava.methods._experts import check_experts, gates, weighted
from delo_llava.methods._instances import at_prefill, instance_means
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods._routed import RoutedMethod, RoutedOptions
from delo_llava.methods.base import SUMMED, Capabilities, Clock, Passes, Past, Reduce, Stage
from delo_llava.strict import read_tensors

FILE = "task_router.safetensors"
#: A plan's values: anything of the rows' number, and at test the weights of the tasks.
ROWS, TASKS = "rows", "tasks"


class ClMoeOptions(RoutedOptions):
    """Options of CL-MoE; symbols of the paper in brackets.

    Attributes:
        experts: that share the rank of each pair [n]; the rank is a multiple of their number.
        top_k: experts that act on a sample by its instance router, and that a task counts as its own [K].
        beta: share of the instance router at test [β]; 1 leaves the task router out.
        gamma: share of the past in an expert that earlier tasks use, too; of the present in one that this
            task alone uses [γ].
        views: the evidence for a sample's task; the similarity is the mean cosine over those it has.
    """

    experts: int = Field(8, ge=2)
    top_k: int = Field(2, ge=1)
    beta: float = Field(0.5, ge=0, le=1)
    gamma: float = Field(0.7, ge=0, le=1)
    views: tuple[Literal["image", "text", "instruction"], ...] = ("image", "instruction")


class ClMoe(RoutedMethod):
    """Dual routers, dual momentum."""

    Config = ClMoeOptions
    capabilities = Capabilities(answers_as_trained=False)
    _anchors: TaskKeyMemory
    _task: str
    _names: list[str]
    #: Sums of this task's weights, and how many rows they are of: L×(n + 1), float64.
    _sums: Tensor
    #: As they were before the step `_step`.
    _kept: Tensor
    _step: int

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.multiple = self.outputs = options.experts
        check_experts(options)
        self._seen: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._earlier: list[Tensor] = []

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        model = self.continued(base, stage.past) if stage.past else self.fresh(base, ADAPTER)
        self._task, self._anchors = stage.name, TaskKeyMemory(self.width(base), covariance=False)
        self._names = _names(model)
        self._sums = torch.zeros(len(self._names), self.options.experts + 1, dtype=torch.float64)
        self._step = -1
        self._earlier = [_read(past.folder) for past in stage.past.values()]
        pairs = {n: p for n, p in model.named_parameters() if "lowrank_A" in n or "lowrank_B" in n}
        self._before = {n: p.detach().clone() for n, p in pairs.items()} if stage.past else {}
        return mixed(model, self.mix, lambda inputs, queries: RowPlan({ROWS: inputs.presence}, inputs))  # type: ignore[no-any-return]

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        """Add the micro-batch's weights to the task's sums; a forward may run twice and adds nothing."""
        if clock.step != self._step:
            self._step, self._kept = clock.step, self._sums.clone()
        for name, gate in self._seen.items():
            counted = torch.cat([gate.double().sum(0), gate.new_tensor([len(gate)]).double()])
            self._sums[self._names.index(name)] += counted.cpu()
        self._seen = {}

    def left_out(self, clock: Clock) -> None:
        if clock.step == self._step:
            self._sums = self._kept

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{SUMMED}weights": self._sums}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self._sums = state[f"{SUMMED}weights"].clone()

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """The task router, the momentum and the anchors."""
        self._sums = reduce(self._sums)
        if self._before:
            share = shares(task_weights(self._sums), self._earlier, self.options.top_k, self.options.gamma)
            self._mix_with_the_past(model, share)
        self.anchor(self._anchors, self._task, model, passes, reduce)

    def _mix_with_the_past(self, model: nn.Module, share: Tensor) -> None:
        """θ_t = λ θ_{t−1} + (1 − λ) φ_t; an expert is a block of rows of A and of columns of B."""
        of = dict(zip(self._names, share, strict=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in self._before:
                    continue
                linear = next(n for n in self._names if f".{n}." in f".{name}")
                axis = 0 if "lowrank_A" in name else 1
                size = parameter.shape[axis] // self.options.experts
                shape = (-1, 1) if axis == 0 else (1, -1)
                blend = of[linear].repeat_interleave(size).view(shape).to(parameter)
                parameter.copy_(blend * self._before[name].to(parameter) + (1 - blend) * parameter)

    # ---- what is kept
    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        self._anchors.save_task(folder, stage.name)
        save_file({"weights": task_weights(self._sums)}, folder / FILE)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        self._anchors = TaskKeyMemory(self.width(base), covariance=False)
        self._anchors.load({name: stage.folder for name, stage in past.items()})
        self._earlier = [_read(stage.folder) for stage in past.values()]
        model = self.opened(base, past, only_last=True)
        self._names = _names(model)
        return mixed(model, self.mix, self.by_task)  # type: ignore[no-any-return]

    # ---- routing
    def by_task(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        """One for the nearest task of a row, B×T; where nothing speaks for one, all alike."""
        tasks = tuple(self._anchors.tasks)
        index, _ = self._anchors.choose(queries, inputs.presence, tasks, "cosine", self.options.views)
        chosen = nn.functional.one_hot(index.clamp(min=0), len(tasks)).float()
        alike = torch.full_like(chosen, 1 / len(tasks))
        return RowPlan({TASKS: torch.where(index.unsqueeze(1) >= 0, chosen, alike)}, inputs)

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """s·Σ_i G_i B_i A_i x, G by the instance, at test by the task, too."""
        plan: RowPlan = layer.carrier.current()
        gate = at_prefill(layer, plan, lambda: self._instance(layer, x, plan))
        if TASKS in plan.values:
            table = torch.stack([weights[self._names.index(layer.name)] for weights in self._earlier])
            by_task = plan.of(layer, plan.values[TASKS]) @ table.to(x.device)
            gate = self.options.beta * gate + (1 - self.options.beta) * by_task
        else:
            inputs = plan.inputs
            # A dummy in a missing image's place is no sample's, and which engine needs one must not matter.
            shown = inputs.presence[inputs.image_rows, 0] if layer.projector else slice(None)
            self._seen[layer.name] = gate.detach()[shown]
        return layer.up(ADAPTER, weighted(layer.down(ADAPTER, x), plan.spread(layer, gate, x)))

    def _instance(self, layer: LowRankLayer, x: Tensor, plan: RowPlan) -> Tensor:
        return gates(layer.scores(ADAPTER, instance_means(layer, x, plan)), self.options.top_k)


def task_weights(sums: Tensor) -> Tensor:
    """G^T: mean weights of the experts in every linear, L×n; zero where no row was seen.

    Args:
        sums: L×(n + 1), sums of weights and the number of rows.
    """
    return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).float()


def shares(now: Tensor, earlier: list[Tensor], top_k: int, gamma: float) -> Tensor:
    """λ of every linear's experts, L×n: how much of the past stays.

    Args:
        now: G^T of this task, L×n; earlier: those of the tasks before.
        top_k: so many of the largest weights make an expert one that the task uses.
        gamma: λ of experts that both use; 1 − γ is that of those that this task alone uses.
    """
    mine = _used(now, top_k)
    before = torch.stack([_used(weights, top_k) for weights in earlier]).any(0)
    share = torch.ones_like(now)
    share[mine & before] = gamma
    share[mine & ~before] = 1 - gamma
    return share


def _used(weights: Tensor, top_k: int) -> Tensor:
    """The experts with the largest weights, bool L×n; ties go to the lower index, and none where all are
    zero.
    """
    order = weights.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, True) & (weights > 0)


def _names(model: nn.Module) -> list[str]:
    """Names of the adapted linears, in the model's order."""
    return [layer.name for part in lowrank(model).layers() for layer in part]


def _read(folder: Path) -> Tensor:
    """G^T of a finished task, L×n."""
    return read_tensors(folder / FILE, "The task's router")["weights"]


METHOD = ClMoe
