"""`delo`: dual-decomposed low-rank experts per task and modality; key memory picks the task per sample.

Source: Liu, Li, Tang, Razzak, "DeLo", AAAI-26 (arXiv 2603.01632). The generative mapping, and where this
implementation leaves the released code on purpose (straight-through routing gradient, presence flags,
symmetric cross-modal routing, true running means as keys, per-sample choice among trained tasks), is told in
docs/delo.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from delo_llava.adapters.carrier import find_carrier, frozen_queries, routing
from delo_llava.adapters.store import open_adapters, save_adapter
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import IGNORE, Batch
from delo_llava.data.examples import Examples, Item, View, dropped_view
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.moments import moment_bytes
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.features.ridge import FEWEST, RidgeStatistics
from delo_llava.features.task_keys import TaskKeyMemory
from delo_llava.methods.base import (
    ROWS,
    SUMMED,
    Capabilities,
    Clock,
    Footprint,
    Method,
    Passes,
    Past,
    Prompt,
    Reduce,
    Stage,
    TaskChoice,
    answer_logits,
    answer_loss_sum,
)
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.cross_modal import CrossModal
from delo_llava.methods.delo.losses import align_loss_sum, consistency_loss_sum
from delo_llava.methods.delo.options import (
    DeloOptions,
    adapter_config,
    router_parameters,
    trainable_parameters,
)
from delo_llava.methods.delo.plan import RoutePlan
from delo_llava.methods.delo.tuner import set_trainable, tuner
from delo_llava.methods.delo.use import RoutingUse

#: Name of the view for the consistency loss.
DROPPED = "dropped"
#: The adapter of pools that all tasks share.
ADAPTER = "default"
#: Option `task` -> what the harness must know.
CAPABILITIES = {
    "chosen": Capabilities(chooses_task=True, isolated=True),
    "oracle": Capabilities(needs_task=True, isolated=True),
    "shared": Capabilities(),
}


class Delo(Method):
    """DeLo over a frozen base. One adapter per task; a stage trains its own and reads nothing of the others
    but sums (unless the tasks share their pools).
    """

    capabilities = CAPABILITIES["chosen"]
    Config = DeloOptions

    def __init__(self, options: DeloOptions, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.options: DeloOptions = options
        self.capabilities = CAPABILITIES[options.task]
        self._keys: TaskKeyMemory | None = None
        self._ridge: RidgeStatistics | None = None
        self._task, self._seed = "", 0
        self._seen: tuple[Queries, Tensor] | None = None
        #: Of the step `_step`'s micro-batches: they count once it is known that the step was not left out.
        self._held: list[tuple[Queries, Tensor]] = []
        self._step = -1
        self._use = RoutingUse()

    def refuses(self) -> Mapping[str, str]:
        exact = self.options.conditional == "factor"
        return {"zero=3": "conditional=factor reads all pools at once, which ZeRO-3 shards"} if exact else {}

    def views(self, items: Sequence[Item], clock: Clock) -> Mapping[str, View]:
        """The complete rows with one modality dropped, for the consistency loss: the student's view."""
        return {DROPPED: dropped_view(items, self._seed)} if self.options.consistency else {}

    def remarks(self, own: Mapping[str, Examples]) -> list[str]:
        """The stages up to which too few records are complete for a ridge map."""
        if self.options.cross_modal != "ridge":
            return []
        seen = (int(examples.presence.all(1).sum()) for examples in own.values())
        counts = accumulate(min(count, self.options.ridge_samples) for count in seen)
        lacking = [name for name, count in zip(own, counts, strict=True) if count < FEWEST]
        return [
            f"delo.cross_modal=ridge: {', '.join(lacking)}: too few training records with image and context "
            "so far to fit a map; it stays the identity, as cross_modal=identity is"
        ] * bool(lacking)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        hidden = self.backbone.hidden_size(base)
        shared = self.options.task == "shared"
        self._task, self._seed = ADAPTER if shared else stage.name, stage.seed
        self._keys, self._held, self._step = self._memory(hidden), [], -1
        if shared and stage.past:
            model = open_adapters(base, _last(stage.past), DeloConfig, trainable=True)
        else:
            config = adapter_config(self.options, base, self.backbone)
            model = get_peft_model(base, config, adapter_name=self._task)
        set_trainable(model, self._task)
        if self.options.cross_modal == "ridge":
            past = list(stage.past.values())
            self._ridge = RidgeStatistics.load(past[-1].folder) if past else RidgeStatistics.empty(hidden)
        return model

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Add this task's complete samples to the ridge statistics of the earlier ones and solve the map,
        which then stays; without any it stays the identity.
        """
        if self._ridge is None:
            return
        here = RidgeStatistics.empty(self._ridge.sums.shape[1])
        for batch in passes.complete(self.options.ridge_samples):
            here.observe(frozen_queries(model, RouteInputs.from_batch(batch), batch.inputs), batch.presence)
        summed = RidgeStatistics(**{name: reduce(tensor) for name, tensor in here.tensors().items()})
        self._ridge = self._ridge.merge(summed)
        self._fit(model)

    def _fit(self, model: nn.Module) -> None:
        cross = tuner(model).delo_cross[self._task]
        assert isinstance(cross, CrossModal) and self._ridge is not None
        if self._ridge.count >= FEWEST:
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
        keys = 3 * 8 * width + 3 * moment_bytes(width) * (options.matcher == "lda")
        stored = keys * (options.task == "chosen")
        stored += (2 * moment_bytes(width) + 2 * width**2) * (options.cross_modal == "ridge")
        ridge = 2 * width * (width + 1) * (options.cross_modal == "ridge")
        parameters = trainable_parameters(options, base, self.backbone)
        # A router computes in float64, and a step keeps these copies of its parameters for the backward pass.
        held = 8 * router_parameters(options, base, self.backbone)
        every = options.task != "shared"
        return Footprint(parameters, "gathered", 2 * options.rank, stored, every, ridge, held)

    def _consistency(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        """Σ KL(complete view ‖ view with one modality dropped) over answer tokens; the complete view gets no
        gradient.
        """
        view = batch.views[DROPPED]
        assert batch.labels is not None and view.batch.labels is not None
        student, _ = _routed_logits(model, view.batch)
        if view.batch.filler:  # no row of this batch is complete; the forward keeps the ranks in step
            return student.sum() * 0.0
        counts = (batch.labels[:, 1:] != IGNORE).sum(1).tolist()
        by_row = logits.detach().split(counts)
        teacher = torch.cat([by_row[row] for row in view.rows.tolist()])
        return consistency_loss_sum(teacher, batch.labels[view.rows], student, view.batch.labels)

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        """Add the micro-batch to the task's keys: its own samples only, never the dropped views (trap T6)."""
        if clock.step != self._step:
            self._count()
            self._step = clock.step
        if self._keys is not None and self._seen is not None:
            self._held.append(self._seen)
        self._seen = None

    def left_out(self, clock: Clock) -> None:
        if clock.step == self._step:
            self._held = []

    def _count(self) -> None:
        """Give the keys what is held of a step that was made."""
        for seen in self._held:
            assert self._keys is not None
            self._keys.observe(self._task, *seen)
        self._held = []

    def state_dict(self) -> dict[str, Tensor]:
        """The keys' sums of this rank since the stage began, and the ridge statistics, which ranks share."""
        self._count()
        sums, rows = ({}, {}) if self._keys is None else self._keys.running(self._task)
        ridge = {} if self._ridge is None else self._ridge.tensors()
        named = {f"{SUMMED}keys/{name}": tensor for name, tensor in sums.items()}
        named |= {f"{ROWS}keys/{view}": tensor for view, tensor in rows.items()}
        return named | {f"ridge/{name}": tensor for name, tensor in ridge.items()}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        if self._keys is not None:
            self._keys.resume(self._task, under(f"{SUMMED}keys/"), under(f"{ROWS}keys/"))
        if self._ridge is not None:
            self._ridge = RidgeStatistics(**under("ridge/"))
            self._fit(model)

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        self._count()
        if self._keys is not None:
            self._keys.settle(self._task, reduce)

    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        save_adapter(model, self._task, folder)
        if self._keys is not None:
            self._keys.save_task(folder, stage.name)
        if self._ridge is not None:
            self._ridge.save(folder)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base
        if self.options.task == "shared":
            return open_adapters(base, _last(past), DeloConfig)
        adapters = {name: stage.folder for name, stage in past.items()}
        self._keys = self._memory(self.backbone.hidden_size(base))
        if self._keys is not None:
            self._keys.load(adapters)
        return open_adapters(base, adapters, DeloConfig)

    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice | None:
        """Per sample, among trained tasks; a view that the options leave out is never used."""
        if not self.capabilities.chooses_task:
            return None
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
        """Route by `tasks`, or by what all tasks share; on the bare base (the zero-shot row) nothing is
        routed.
        """
        shared = self.options.task == "shared"
        if find_carrier(model) is None or (tasks is None and not shared):
            yield Prompt.of(batch)
            return
        pools = ADAPTER if shared or tasks is None else list(tasks)
        with routing(model, RouteInputs.from_batch(batch, tasks=pools, expand=beams)) as route:
            yield Prompt.of(batch)
        if route.plan is not None:
            # Beams repeat each row, which is one sample all the same.
            chosen = route.plan.selection.rows(
                torch.arange(0, route.inputs.rows, beams, device=batch.presence.device)
            )
            # Pools that all share are counted by the task of the samples that used them.
            self._use.add(chosen, tasks or batch.tasks, batch.presence, route.plan.pool_size)

    def routing_use(self, model: nn.Module) -> dict[str, Any] | None:
        pools = self._use.take()
        if not pools:
            return None
        language, projector = tuner(model).layer_names()
        return {"layers": {"image": [*projector, *language], "text": language}, "pools": pools}

    def _memory(self, hidden: int) -> TaskKeyMemory | None:
        """An empty key memory, None where no task is chosen."""
        if self.options.task != "chosen":
            return None
        lda = self.options.matcher == "lda"
        return TaskKeyMemory(hidden, covariance=lda, unfamiliar=self.options.unfamiliar if lda else 0.0)


def _last(past: Mapping[str, Past]) -> dict[str, Path]:
    """The folder of the latest stage, by the name of what all tasks share."""
    return {ADAPTER: list(past.values())[-1].folder}


def _routed_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, RoutePlan]:
    """Logits of the N answer tokens, N×V, and the plan they were computed with."""
    with routing(model, RouteInputs.from_batch(batch)) as route:
        logits = answer_logits(model, batch)
    assert route.plan is not None
    return logits, route.plan
