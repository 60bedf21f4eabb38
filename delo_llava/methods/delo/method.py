"""`delo`: dual-decomposed low-rank experts per task and modality; key memory picks the task per sample.

Source: Liu, Li, Tang, Razzak, "DeLo", AAAI-26 (arXiv 2603.01632). The generative mapping, and where this
implementation leaves the released code on purpose (straight-through routing gradient, presence flags,
symmetric cross-modal routing, true running means as keys, per-sample choice among trained tasks), is told in
docs/delo.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from pydantic import Field, model_validator
from torch import Tensor, nn

from delo_llava.adapters.carrier import frozen_queries, routing
from delo_llava.adapters.store import open_adapters, save_adapter
from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.data.examples import Item, View, dropped_view
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.features.ridge import RidgeStatistics
from delo_llava.features.task_keys import TaskKeyMemory
from delo_llava.methods.base import (
    SUMMED,
    Capabilities,
    Clock,
    Footprint,
    Method,
    MethodConfig,
    Passes,
    Past,
    Prompt,
    Reduce,
    Stage,
    TaskChoice,
    answer_loss_sum,
)
from delo_llava.methods.delo.config import DeloConfig, trainable_parameter_count
from delo_llava.methods.delo.cross_modal import CrossModal
from delo_llava.methods.delo.losses import align_loss_sum, consistency_loss_sum
from delo_llava.methods.delo.plan import RoutePlan
from delo_llava.methods.delo.tuner import set_trainable, tuner
from delo_llava.methods.delo.use import RoutingUse

#: Name of the view for the consistency loss.
DROPPED = "dropped"


class DeloOptions(MethodConfig):
    """Options of DeLo; symbols of the paper in brackets.

    Attributes:
        pool_size: factors per pool [E].
        rank: factors chosen per sample, the rank of each modality's update [r].
        alpha_over_rank: the update is scaled by this [s]; the release's undivided alpha = 2 over factors
            drawn from N(0, 1) is too large a step (trap T13).
        latent: width of the router's shared down-projection of a query.
        scope: `own` applies a modality's update to that modality's tokens, `all` to every token.
        gate: `ste` gives routers a gradient without changing the function; `none` is index-only; `softmax`
            weights the factors.
        temperature: of the gate's softmax [tau].
        conditional: how the choice of B depends on that of A: `table`, `factor` (the exact form, larger) or
            `none`.
        cross_modal: the map from the present modality's query to the missing one's: `identity`, `linear` or
            `ridge`.
        ridge: relative ridge of the closed-form map.
        ridge_samples: complete samples per task that enter the ridge statistics.
        matcher: how the task is chosen: `cosine` to the keys, or `lda` with a shared covariance.
        views: the evidence used for the choice.
        align: weight of the alignment loss [lambda_a]; 0 turns it off.
        consistency: weight of the consistency loss [lambda_c]; 0 turns it off. It costs one more forward, on
            complete rows with one modality dropped.
    """

    pool_size: int = Field(16, ge=1)
    rank: int = Field(4, ge=1)
    alpha_over_rank: float = Field(2.0, gt=0)
    latent: int = Field(64, ge=1)
    scope: Literal["own", "all"] = "own"
    gate: Literal["ste", "none", "softmax"] = "ste"
    temperature: float = Field(1.0, gt=0)
    conditional: Literal["table", "factor", "none"] = "table"
    cross_modal: Literal["identity", "linear", "ridge"] = "ridge"
    ridge: float = Field(1e-2, gt=0)
    ridge_samples: int = Field(512, ge=1)
    matcher: Literal["cosine", "lda"] = "lda"
    views: tuple[Literal["image", "text", "instruction"], ...] = ("image", "text", "instruction")
    align: float = Field(0.0, ge=0)
    consistency: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _rank_fits_pool(self) -> "DeloOptions":
        if self.rank > self.pool_size:
            raise ValueError(
                f"rank {self.rank} is larger than pool_size {self.pool_size}; choose rank <= pool_size"
            )
        return self


class Delo(Method):
    """DeLo over a frozen base. One adapter per task; a stage trains its own and reads nothing of the others
    but sums.
    """

    capabilities = Capabilities(chooses_task=True, isolated=True)
    Config = DeloOptions

    def __init__(self, options: DeloOptions, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.options: DeloOptions = options
        self._keys: TaskKeyMemory | None = None
        self._ridge: RidgeStatistics | None = None
        self._task, self._seed = "", 0
        self._seen: tuple[Queries, Tensor] | None = None
        self._use = RoutingUse()

    def refuses(self) -> Mapping[str, str]:
        exact = self.options.conditional == "factor"
        return {"zero=3": "conditional=factor reads all pools at once, which ZeRO-3 shards"} if exact else {}

    def views(self, items: Sequence[Item], clock: Clock) -> Mapping[str, View]:
        """The complete rows with one modality dropped, for the consistency loss: the student's view."""
        return {DROPPED: dropped_view(items, self._seed)} if self.options.consistency else {}

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        hidden = self.backbone.hidden_size(base)
        model = get_peft_model(
            base, adapter_config(self.options, base, self.backbone), adapter_name=stage.name
        )
        set_trainable(model, stage.name)
        self._task, self._seed, self._keys = stage.name, stage.seed, self._memory(hidden)
        if self.options.cross_modal == "ridge":
            past = list(stage.past.values())
            self._ridge = RidgeStatistics.load(past[-1].folder) if past else RidgeStatistics.empty(hidden)
        return model

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Add this task's complete samples to the ridge statistics of the earlier ones and solve the map,
        which then stays.
        """
        if self._ridge is None:
            return
        here = RidgeStatistics.empty(self._ridge.sums.shape[1])
        for batch in passes.complete(self.options.ridge_samples):
            here.observe(
                frozen_queries(model, RouteInputs.from_batch(batch), batch.inputs), batch.presence.cpu()
            )
        summed = RidgeStatistics(**{name: reduce(tensor) for name, tensor in here.tensors().items()})
        self._ridge = self._ridge.merge(summed)
        self._fit(model)

    def _fit(self, model: nn.Module) -> None:
        cross = tuner(model).delo_cross[self._task]
        assert isinstance(cross, CrossModal) and self._ridge is not None
        cross.fit(self._ridge, self.options.ridge)

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = super().counts(batch)
        if self.options.align:
            counts["align"] = float(batch.presence.all(1).sum())
        if self.options.consistency:
            counts["consistency"] = super().counts(batch.views[DROPPED].batch)["answer"]
        return counts

    def weights(self, clock: Clock) -> dict[str, float]:
        auxiliary = {"align": self.options.align, "consistency": self.options.consistency}
        return super().weights(clock) | {name: weight for name, weight in auxiliary.items() if weight}

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits, plan = _routed_logits(model, batch)
        assert batch.labels is not None
        sums = {"answer": answer_loss_sum(logits, batch.labels)}
        if self.options.align:
            chosen = plan.selection
            latents, proxies = (
                (chosen.image_latent, chosen.text_latent),
                (chosen.image_proxy, chosen.text_proxy),
            )
            sums["align"] = align_loss_sum(latents, proxies, batch.presence.all(1))
        if self.options.consistency:
            sums["consistency"] = self._consistency(model, batch, logits)
        # Kept for after_backward: a forward may run twice under checkpointing and must not count anything.
        self._seen = (plan.queries, plan.presence)
        return sums

    def footprint(self, base: nn.Module) -> Footprint:
        width, options = self.backbone.hidden_size(base), self.options
        # Key sums of three views, and second moments where they are kept; the ridge map's own moments.
        sums = 3 * width + 3 * width**2 * (options.matcher == "lda")
        sums += 3 * width**2 * (options.cross_modal == "ridge")
        parameters = trainable_parameters(options, base, self.backbone)
        return Footprint(parameters, "gathered", 2 * options.rank, 8 * sums, every_task=True)

    def _consistency(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        """Σ KL(complete view ‖ view with one modality dropped) over answer tokens; the complete view gets no
        gradient.
        """
        view = batch.views[DROPPED]
        assert batch.labels is not None and view.batch.labels is not None
        student, _ = _routed_logits(model, view.batch)
        if view.batch.filler:  # no row of this batch is complete; the forward keeps the ranks in step
            return student.sum() * 0.0
        teacher = logits.detach()[view.rows], batch.labels[view.rows]
        return consistency_loss_sum(*teacher, student, view.batch.labels)

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        """Add the micro-batch to the task's keys: its own samples only, never the dropped views (trap T6)."""
        assert self._keys is not None and self._seen is not None
        self._keys.observe(self._task, *self._seen)
        self._seen = None

    def state_dict(self) -> dict[str, Tensor]:
        """The keys' sums of this rank since the stage began, and the ridge statistics, which ranks share."""
        assert self._keys is not None
        keys = self._keys.pending(self._task).tensors()
        ridge = {} if self._ridge is None else self._ridge.tensors()
        named = {f"{SUMMED}keys/{name}": tensor for name, tensor in keys.items()}
        return named | {f"ridge/{name}": tensor for name, tensor in ridge.items()}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        assert self._keys is not None

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        pending = self._keys.pending(self._task)
        for name, tensor in under(f"{SUMMED}keys/").items():
            pending.tensors()[name].copy_(tensor)
        if self._ridge is not None:
            self._ridge = RidgeStatistics(**under("ridge/"))
            self._fit(model)

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        assert self._keys is not None
        self._keys.settle(self._task, reduce)

    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        assert self._keys is not None
        save_adapter(model, stage.name, folder)
        self._keys.save_task(folder, stage.name)
        if self._ridge is not None:
            self._ridge.save(folder)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base
        adapters = {name: stage.folder for name, stage in past.items()}
        self._keys = self._memory(self.backbone.hidden_size(base))
        self._keys.load(adapters)
        return open_adapters(base, adapters, DeloConfig)

    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        """Per sample, among trained tasks; a view that the options leave out is never used."""
        if self._keys is None or not self._keys.tasks:
            raise DeloError("No task was trained yet, so none can be chosen", fix="train a stage first")
        queries = frozen_queries(model, RouteInputs.from_batch(batch), batch.inputs)
        wanted = [view for view in (views or VIEWS) if view in self.options.views]
        tasks = tuple(self._keys.tasks)
        index, scores = self._keys.choose(queries, batch.presence, tasks, self.options.matcher, wanted)
        return TaskChoice(tasks, index, scores)

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        """Route by `tasks`; without them (the bare base of the zero-shot row) nothing is routed."""
        if tasks is None:
            yield Prompt.of(batch)
            return
        with routing(model, RouteInputs.from_batch(batch, tasks=list(tasks), expand=beams)) as route:
            yield Prompt.of(batch)
        if route.plan is not None:
            # Beams repeat each row, which is one sample all the same.
            chosen = route.plan.selection.rows(
                torch.arange(0, route.inputs.rows, beams, device=batch.presence.device)
            )
            self._use.add(chosen, tasks, batch.presence, route.plan.pool_size)

    def routing_use(self, model: nn.Module) -> dict[str, Any] | None:
        pools = self._use.take()
        if not pools:
            return None
        language, projector = tuner(model).layer_names()
        return {"layers": {"image": [*projector, *language], "text": language}, "pools": pools}

    def _memory(self, hidden: int) -> TaskKeyMemory:
        return TaskKeyMemory(hidden, covariance=self.options.matcher == "lda")


def adapter_config(options: DeloOptions, base: nn.Module, backbone: Backbone) -> DeloConfig:
    """The PEFT configuration for every language and projector linear of `base`."""
    return DeloConfig(
        r=options.rank, pool_size=options.pool_size, alpha=options.alpha_over_rank * options.rank,
        scope=options.scope,
        gate=options.gate, temperature=options.temperature, conditional=options.conditional,
        latent=options.latent,
        cross_modal=options.cross_modal, target_modules=backbone.language_pattern,
        projector_modules=backbone.projector_pattern, projector=backbone.projector_name,
        hidden_size=backbone.hidden_size(base),
    )  # fmt: skip


def trainable_parameters(options: DeloOptions, base: nn.Module, backbone: Backbone) -> int:
    """Trainable parameters of one task; the LoRA baselines are matched to it."""
    return trainable_parameter_count(adapter_config(options, base, backbone), adapted_linears(base, backbone))


def _routed_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, RoutePlan]:
    """Logits B×S×V and the plan they were computed with."""
    with routing(model, RouteInputs.from_batch(batch)) as route:
        logits = model(**batch.inputs).logits
    assert route.plan is not None
    return logits, route.plan
