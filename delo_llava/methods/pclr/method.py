"""PCLR over the stages of a run; its head is in the folder's `__init__.py`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.carrier import frozen_queries, routing
from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, RowPlan, inject, mixed
from delo_llava.adapters.own import TENSORS, require_own_adapter
from delo_llava.adapters.store import open_adapters
from delo_llava.data.collate import Batch
from delo_llava.data.segments import SEGMENT_CONTEXT, SEGMENT_INSTRUCTION, SEGMENT_OTHER
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.methods._lowrank import ADAPTER, LowRankMethod, LowRankOptions, activate
from delo_llava.methods.base import (
    Capabilities,
    Clock,
    Passes,
    Past,
    Prompt,
    Reduce,
    Stage,
    TaskChoice,
    Trained,
    answer_logits,
    answer_loss_sum,
)
from delo_llava.methods.pclr.memory import Pool
from delo_llava.methods.pclr.pool import chosen, distil_sum, drawn_task, dropped, scores, student_keys, unit
from delo_llava.strict import read_tensors

#: The pool before it is compressed, frozen.
TEACHER = "teacher"


class PclrOptions(LowRankOptions):
    """Options of PCLR; symbols of the paper in brackets.

    Attributes:
        rank: ranks that act on a sample, and new ones of a task [R]; or `match`: as many as have the
            trainable parameters of what the method `like` trains in a stage.
        pool: most ranks that are kept, in multiples of `rank` [256 / 64].
        image_weight: of the image's score beside the words' [d_v / d_l].
        samples: of a task whose mean query is its key.
        compress: share of a stage's steps in which a full pool is compressed before the task is learned.
        distil_rate: learning rate of these steps, as a share of the stage's [5e-5 / 2e-4].
        top_logits: of the teacher that the student imitates.
        shared_from: number of the task, from 1, from which on R/2 more ranks act on every sample.
    """

    pool: float = Field(4.0, ge=1.5)
    image_weight: float = Field(0.25, ge=0)
    samples: int = Field(512, ge=1)
    compress: float = Field(0.5, gt=0, lt=1)
    distil_rate: float = Field(0.25, gt=0)
    top_logits: int = Field(100, ge=1)
    shared_from: int = Field(4, ge=1)


class Pclr(LowRankMethod):
    """One adapter whose ranks are [shared | older | new]; a frozen copy of the older ones teaches."""

    capabilities = Capabilities(chooses_task=True, answers_as_trained=False)
    Config = PclrOptions

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._pool = Pool.empty(1)  # as it was left; in training, of the stage before
        self._keys = self._pool.keys  # of the older ranks, as they are trained
        self._rank = self._new = self._shared = self._seed = 0
        self._name, self._key = "", torch.zeros(2, 1)
        self._losses, self._seen = torch.zeros(0), torch.zeros(2, dtype=torch.float64)
        self._before = self._losses
        self._started, self._clock, self._closed = False, Clock(0, 1, 1), False
        self._last: Tensor | None = None
        self._how: Callable[[Tensor, RouteInputs], tuple[str, Tensor]] = self._learning

    # ---- the model
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        config = self.config(base)
        self._rank, self._name, self._seed = config.r, stage.name, stage.seed
        folder = list(stage.past.values())[-1].folder if stage.past else None
        self._pool = Pool.load(folder) if folder else Pool.empty(self.backbone.hidden_size(base))
        self._shared = max(1, self._rank // 2) if stage.index + 1 >= self.options.shared_from else 0
        out = self._make_room()
        weight = self.options.image_weight
        kept = self._pool.keys[~out]
        compressing = bool(out.any())
        self._keys = student_keys(kept, self._pool.queries, self._rank, weight) if compressing else kept
        self._losses = torch.ones(len(self._pool.tasks), dtype=torch.float64)
        self._started = self._closed = False
        ranks = self._shared + len(kept) + self._new
        model = inject(base.requires_grad_(False), _sized(config, ranks), ADAPTER, self._mix, self._decide)
        if folder:
            require_own_adapter(folder, LowRankConfig)
            was = read_tensors(folder / TENSORS, "The ranks of a stage")
            shared = torch.arange(self._pool.shared)
            older = self._pool.shared + (~out).nonzero().squeeze(1)
            _place(model, ADAPTER, was, shared, torch.arange(self._pool.shared))
            _place(model, ADAPTER, was, older, self._shared + torch.arange(len(kept)))
            if compressing:
                whole = torch.arange(self._pool.shared + len(self._pool.keys))
                model.add_adapter(TEACHER, _sized(config, len(whole)))
                _place(model, TEACHER, was, whole, whole)
        activate(model, [ADAPTER], train=[ADAPTER])
        return model  # type: ignore[no-any-return]

    def _make_room(self) -> Tensor:
        """Set how many ranks the task gets, and mask the older ones that are dropped for them."""
        older, room = len(self._pool.keys), int(self.options.pool * self._rank)
        full = older + self._rank > room
        self._new = max(1, self._rank // 2) if full and self._pool.compressed else self._rank
        return dropped(older, max(0, older + self._new - room))

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """The task's key: the unit mean of its samples' queries."""
        total = torch.zeros(2, self._pool.keys.shape[-1], dtype=torch.float64)
        for batch in passes.drawn(self.options.samples):
            if not batch.filler:
                found = frozen_queries(model, self._inputs(batch), batch.inputs)
                total += _pair(found).sum(0).double().cpu()
        self._key = unit(reduce(total))
        if not self._compressing and len(self._keys):
            source, target = self._matches()
            for layer in _layers(model):
                for part, dim in (("A", 0), ("B", 1)):
                    weight: Any = getattr(layer, f"lowrank_{part}")[ADAPTER].weight
                    rows = weight.data.index_select(dim, source.to(weight.device))
                    weight.data.index_copy_(dim, target.to(weight.device), rows)

    @property
    def _compressing(self) -> bool:
        """This stage compresses first."""
        return len(self._keys) < len(self._pool.keys)

    def _matches(self) -> tuple[Tensor, Tensor]:
        """Positions of the older ranks that suit the task best, and of the new ones that start from them."""
        fit = scores(self._key.unsqueeze(0), self._keys, self.options.image_weight)
        best = fit[0].sort(descending=True, stable=True).indices[: self._new]
        return self._shared + best, self._shared + len(self._keys) + torch.arange(len(best))

    # ---- what acts on a row
    def _inputs(self, batch: Batch, views: Sequence[str] = VIEWS, **more: Any) -> RouteInputs:
        """As for routing, with all words of the wanted views in one segment."""
        inputs = RouteInputs.from_batch(batch, **more)
        wanted = {"text": SEGMENT_CONTEXT, "instruction": SEGMENT_INSTRUCTION}
        words = torch.zeros_like(inputs.segments, dtype=torch.bool)
        for view in set(views) & wanted.keys():
            words |= inputs.segments == wanted[view]
        segments = torch.full_like(inputs.segments, SEGMENT_OTHER).masked_fill(words, SEGMENT_INSTRUCTION)
        return replace(inputs, segments=segments)

    def _decide(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        adapter, coefficients = self._how(_pair(queries).double().cpu(), inputs)
        return RowPlan({"ranks": coefficients.to(inputs.input_ids.device)}, inputs, {"adapter": adapter})

    def _coefficients(self, acting: Tensor, shared: int) -> Tensor:
        """B×(S + N) fp32: one for every acting rank (bool B×N), R/S for the shared ones."""
        front = torch.full((len(acting), shared), self._rank / max(1, shared))
        return torch.cat([front, acting.float()], 1)

    def _learning(self, queries: Tensor, inputs: RouteInputs) -> tuple[str, Tensor]:
        """All new ranks, and the best older ones up to R."""
        fit = scores(queries, self._keys, self.options.image_weight)
        older = chosen(fit, self._rank - self._new)
        new = torch.ones(len(queries), self._new, dtype=torch.bool)
        return ADAPTER, self._coefficients(torch.cat([older, new], 1), self._shared)

    def _as_task(self, task: int, teacher: bool) -> Callable[[Tensor, RouteInputs], tuple[str, Tensor]]:
        """Every row by the query of an earlier task: the whole pool, or what is left of it."""

        def how(queries: Tensor, inputs: RouteInputs) -> tuple[str, Tensor]:
            asked = self._pool.queries[task].expand(len(queries), -1, -1)
            keys = self._pool.keys if teacher else self._keys
            acting = chosen(scores(asked, keys, self.options.image_weight), self._rank)
            if teacher:
                return TEACHER, self._coefficients(acting, self._pool.shared)
            nothing = torch.zeros(len(acting), self._new, dtype=torch.bool)
            return ADAPTER, self._coefficients(torch.cat([acting, nothing], 1), self._shared)

        return how

    def _answering(self, queries: Tensor, inputs: RouteInputs) -> tuple[str, Tensor]:
        """The best of all ranks for rows of the newest task, of the older ones for the others."""
        pool = self._pool
        fit = scores(queries, pool.keys, self.options.image_weight)
        older = torch.tensor([task != pool.tasks[-1] for task in inputs.tasks or ()])
        if len(pool.tasks) > 1:
            fit[:, len(pool.keys) - pool.new :].masked_fill_(older.unsqueeze(1), -torch.inf)
        return ADAPTER, self._coefficients(chosen(fit, pool.rank) & fit.isfinite(), pool.shared)

    def _mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        plan: RowPlan = layer.carrier.current()
        name = plan.extra["adapter"]
        u = layer.down(name, x)
        return layer.up(name, u * plan.at(layer, "ranks", u))

    # ---- losses
    def _distils(self, clock: Clock) -> bool:
        """The step belongs to the compression."""
        return self._compressing and clock.step < self._switch(clock)

    def _switch(self, clock: Clock) -> int:
        """Steps of the compression."""
        share: float = self.options.compress
        return max(1, round(share * clock.steps))

    def counts(self, batch: Batch) -> dict[str, float]:
        answers = super().counts(batch)["answer"]
        return {"answer": answers, "distil": answers}

    def weights(self, clock: Clock) -> dict[str, float]:
        self._clock = clock  # asked before every step; the losses must know where the stage stands
        if not self._compressing:
            return super().weights(clock)
        now = self._distils(clock)
        return {"answer": float(not now), "distil": float(now)}

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        if not self._distils(self._clock):
            return {"answer": answer_loss_sum(self._logits(model, batch, self._learning), batch.labels)}
        task = drawn_task(self._losses, self._seed + self._clock.step)
        with torch.no_grad():
            teacher = self._logits(model, batch, self._as_task(task, teacher=True))
        student = self._logits(model, batch, self._as_task(task, teacher=False))
        loss = distil_sum(teacher, student, self.options.top_logits)
        self._last = loss.detach()
        return {"distil": loss}

    def _logits(self, model: nn.Module, batch: Batch, how: Any) -> Tensor:
        self._how = how
        with routing(model, self._inputs(batch)):
            return answer_logits(model, batch)

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        if self._last is not None:
            self._seen += torch.tensor([float(self._last), self.counts(batch)["distil"]], dtype=torch.float64)
        self._last = None

    # ---- who is trained
    def _free(self, clock: Clock) -> Tensor:
        """The ranks that this step trains, bool S + N."""
        free = torch.zeros(self._shared + len(self._keys) + self._new, dtype=torch.bool)
        older = slice(self._shared, self._shared + len(self._keys))
        if not self._distils(clock):
            free[:] = True
        free[older] = self._distils(clock)
        return free

    def before_step(self, trained: Trained, clock: Clock) -> None:
        """Frozen ranks must not count for the gradient's norm; the drawn task's loss is kept."""
        self._before = self._losses.clone()
        if self._distils(clock):
            total, count = trained.sum(self._seen).tolist()
            self._seen = torch.zeros(2, dtype=torch.float64)
            if count:
                self._losses[drawn_task(self._losses, self._seed + clock.step)] = total / count
        free = self._free(clock)
        if not bool(free.all()):
            found = trained.gradients()
            trained.add_gradients({n: -g * ~_across(free, n, g) for n, g in found.items()})

    def left_out(self, clock: Clock) -> None:
        self._losses = self._before

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        free, distils = self._free(clock), self._distils(clock)
        if bool(free.all()):
            return
        rate = self.options.distil_rate if distils else 1.0
        new = {}
        for name, value in trained.values().items():
            moved = value if rate == 1.0 else before[name] + rate * (value - before[name])
            new[name] = torch.where(_across(free, name, value), moved, before[name])
        if self._compressing and not self._started and clock.step + 1 >= self._switch(clock):
            self._start(new)
            trained.reset_moments({n: torch.ones_like(v, dtype=torch.bool) for n, v in new.items()})
        trained.rewrite(new)

    def _start(self, values: Mapping[str, Tensor]) -> None:
        """The pool is compressed: new ranks start from those that suit the task best."""
        source, target = self._matches()
        for name, value in values.items():
            dim = _dimension(name)
            rows = value.index_select(dim, source.to(value.device))
            value.index_copy_(dim, target.to(value.device), rows)
        self._started = True

    # ---- what is kept
    def state_dict(self) -> dict[str, Tensor]:
        started = torch.tensor([self._started])
        return {"key": self._key, "losses": self._losses, "started": started}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self._key, self._losses = state["key"], state["losses"]
        self._started = bool(state["started"])

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        was = self._pool
        keys = torch.cat([self._keys, self._key.expand(self._new, -1, -1)])
        queries = torch.cat([was.queries, self._key.unsqueeze(0)])
        compressed = was.compressed or self._compressing
        self._pool = Pool(
            keys, queries, (*was.tasks, self._name), self._rank, self._new, self._shared, compressed
        )
        self._keys, self._closed = keys, True

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        self._pool.save(folder)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        folder = list(past.values())[-1].folder
        model = mixed(open_adapters(base, {ADAPTER: folder}, LowRankConfig), self._mix, self._decide)
        activate(model, [ADAPTER], train=[])
        self._pool = Pool.load(folder)
        self._rank, self._closed = self._pool.rank, True
        return model  # type: ignore[no-any-return]

    # ---- answers
    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        wanted = views or VIEWS
        queries = _pair(frozen_queries(model, self._inputs(batch, wanted), batch.inputs)).double().cpu()
        if "image" not in wanted:
            queries[:, 1] = 0
        found = scores(queries, self._pool.queries, self.options.image_weight)
        index = found.argmax(1).masked_fill((queries == 0).flatten(1).all(1), -1)
        device = batch.presence.device
        return TaskChoice(self._pool.tasks, index.to(device), found.to(device))

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        """Among all ranks for rows of the newest task; without tasks (the bare base) nothing is routed.
        Before a stage is finished, as it trains.
        """
        if tasks is None:
            yield Prompt.of(batch)
            return
        self._how = self._answering if self._closed else self._learning
        with routing(model, self._inputs(batch, tasks=list(tasks), expand=beams)):
            yield Prompt.of(batch)


def _pair(queries: Queries) -> Tensor:
    """Of words and image, B×2×d."""
    return torch.stack([queries.instruction, queries.image], 1)


def _sized(config: LowRankConfig, ranks: int) -> LowRankConfig:
    """The configuration with another number of ranks, at the same scale."""
    return replace(config, r=ranks, alpha=config.alpha / config.r * ranks)


def _layers(model: nn.Module) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def _dimension(name: str) -> int:
    """The dimension of a trained tensor that counts ranks."""
    return 0 if ".lowrank_A." in name else 1


def _across(free: Tensor, name: str, like: Tensor) -> Tensor:
    """A mask of ranks shaped to a trained tensor."""
    mask = free.to(like.device)
    return mask.unsqueeze(1) if _dimension(name) == 0 else mask.unsqueeze(0)


def _place(model: nn.Module, adapter: str, was: Mapping[str, Tensor], source: Tensor, target: Tensor) -> None:
    """Copy ranks of a stage's file into an adapter."""
    for layer in _layers(model):
        for part, dim in (("A", 0), ("B", 1)):
            weight: Any = getattr(layer, f"lowrank_{part}")[adapter].weight
            rows = was[f"base_model.model.{layer.name}.lowrank_{part}.weight"].index_select(dim, source)
            weight.data.index_copy_(dim, target.to(weight.device), rows.to(weight.device))
