"""What prompt methods share: pools of prompts, the prefixes that layers read, sizes, files, answers.

A prompt is a prefix of keys and values at some layers, as wide as the key/value heads and without a position
(`adapters.prompts`): nothing of the sequence moves, and rotary embeddings stay those of the bare prompt. What
a row reads is decided from its frozen queries, once, at the prefill. A prefix takes a share of every softmax
from its first step on, whatever its values are: no prefix is neutral, so these methods do not begin as the
base.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.adapters.carrier import Carrier, find_carrier, routing
from delo_llava.adapters.own import TENSORS
from delo_llava.adapters.prompts import PrefixPlan, attach_prefixes, prefix_shape
from delo_llava.adapters.store import tensor_report
from delo_llava.config import TrainConfig
from delo_llava.data.collate import Batch
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._encoded import EncodedMethod
from delo_llava.methods.base import (
    Capabilities,
    Footprint,
    MethodConfig,
    Past,
    Prompt,
    Stage,
    answer_logits,
    answer_loss_sum,
)
from delo_llava.schema import UserPath
from delo_llava.strict import read_tensors

#: Spread of fresh prompts: an attention's output is near zero there, so the base is only diluted.
SPREAD = 0.02

#: The tensors of one pool by name; the first dimension counts its prompts.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class PromptPlan(PrefixPlan):
    """The prefixes of a forward's rows, and what training wants of the decision.

    Attributes:
        terms: further loss terms by name, one value per row (or a single one).
    """

    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Where prompts of one kind lie: `length` keys and values for each of `heads` heads of width `width`, at
    the layers from `start` on, `layers` of them.
    """

    start: int
    layers: int
    heads: int
    length: int
    width: int

    @classmethod
    def of(cls, base: nn.Module, length: int, depth: float, after: int = 0) -> "Layout":
        """At a share `depth` of the model's layers, at least one, behind the first `after`.

        Raises:
            DeloError: the model has no layer left.
        """
        shape = prefix_shape(base)
        if after >= shape.layers:
            raise DeloError(
                "The model has too few layers for prompts of two kinds",
                given=f"{shape.layers} layers, {after} of them taken",
                fix="lower the share of layers of the first kind",
            )
        layers = min(shape.layers - after, share_of(depth, shape.layers))
        return cls(after, layers, shape.heads, length, shape.width)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one prompt: layers×2×heads×length×width, keys before values."""
        return (self.layers, 2, self.heads, self.length, self.width)

    @property
    def numel(self) -> int:
        """Numbers of one prompt."""
        return torch.Size(self.shape).numel()

    def draw(self, count: int) -> Tensor:
        """`count` fresh prompts from N(0, SPREAD²)."""
        return torch.randn(count, *self.shape) * SPREAD

    def prefixes(self, prompts: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Keys and values by layer, R×heads×length×width each, of prompts R×layers×2×heads×length×width."""
        places = range(self.layers)
        return tuple({self.start + i: prompts[:, i, part] for i in places} for part in (0, 1))  # type: ignore[return-value]


def share_of(depth: float, layers: int) -> int:
    """How many layers a share of them is, at least one."""
    return max(1, round(depth * layers))


def side_by_side(prompts: Tensor) -> Tensor:
    """R×N prompts of one row as one: R×N×layers×2×heads×length×width → R×layers×2×heads×(N·length)×width."""
    rows, count, layers, two, heads, length, width = prompts.shape
    return prompts.permute(0, 2, 3, 4, 1, 5, 6).reshape(rows, layers, two, heads, count * length, width)


def present(queries: Queries, presence: Tensor) -> Queries:
    """The queries with zero where the data says that a modality is missing: a dummy image tells nothing."""
    image, text = (presence[:, i : i + 1].to(torch.float32) for i in (0, 1))
    return Queries(queries.image * image, queries.text * text, queries.instruction)


def mean_cosine(queries: Queries, keys: Tensor) -> Tensor:
    """Mean cosine over the views that a row has, R×M, float64; 0 for a row without any.

    Args:
        queries: as `present` gives them, R×d each: of length one, or zero where a view is absent.
        keys: M×3×d, one key of each view.
    """
    views = torch.stack(list(queries), 1).double()
    seen = (views != 0).any(-1).sum(1).clamp(min=1)
    cosines = torch.einsum("rvd,mvd->rm", views, F.normalize(keys.double(), dim=-1, eps=1e-6))
    return cosines / seen.unsqueeze(1)


def unit_keys(count: int, width: int) -> Tensor:
    """Fresh keys of all views, count×3×width, each of length one (as queries are)."""
    return F.normalize(torch.randn(count, 3, width), dim=-1)


class Pool(nn.Module):
    """Tensors of one pool: parameters if a stage trains them, else buffers, which no optimiser has and
    ZeRO does not shard. A module of its own is what ZeRO-3 gathers and releases.
    """

    def __init__(self, tensors: Tensors, trained: bool) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            if trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self) -> dict[str, Tensor]:
        """Copies, since ZeRO-3 takes parameters away again."""
        return {name: getattr(self, name).clone() for name in self.names}


class Prompts(nn.Module):
    """All pools of a model.

    Args:
        trained: pool → what this stage trains. earlier: pool → what earlier stages left; in the pools that
            grow it comes before.
        stages: whose prompts the growing pools hold, in their order.
    """

    def __init__(
        self, trained: Mapping[str, Tensors], earlier: Mapping[str, Tensors], stages: Sequence[str]
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.trained = nn.ModuleDict({name: Pool(tensors, True) for name, tensors in trained.items()})
        self.earlier = nn.ModuleDict({name: Pool(tensors, False) for name, tensors in earlier.items()})

    def forward(self) -> dict[str, dict[str, Tensor]]:
        """Every pool, whole."""
        held: dict[str, dict[str, Tensor]] = {name: pool() for name, pool in self.earlier.items()}
        for name, pool in self.trained.items():
            own, before = pool(), held.get(name)
            held[name] = own if before is None else {n: torch.cat([before[n], own[n]]) for n in own}
        return held


def prompts_of(model: nn.Module) -> Prompts:
    """The pools of a model, however an engine wraps it.

    Raises:
        DeloError: it has none.
    """
    found = next((m for m in model.modules() if isinstance(m, Prompts)), None)
    if found is None:
        raise DeloError("This model has no prompts", given=type(model).__name__, fix="train a stage first")
    return found


class PromptOptions(MethodConfig):
    """Options of every method whose prompts are asked for by a query.

    Attributes:
        encoder: a folder with a CLIP whose features of image and text are the queries; left out, they are the
            base's own frozen features.
    """

    encoder: UserPath | None = None


class PromptMethod(EncodedMethod):
    """A frozen base with prompts: what they are and who reads which is the method's.

    Attributes:
        growing: pools to which every stage adds its own; earlier prompts of them are frozen. The other pools
            are trained through all stages, without weight decay, so that a prompt which no row of a stage
            reads keeps its bits.
    """

    capabilities = Capabilities(starts_as_base=False)
    growing: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def draw(self, base: nn.Module, earlier: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """What a stage begins with, pool by pool; `earlier` holds the growing pools, empty at first."""

    @abstractmethod
    def plan(
        self, base: nn.Module, held: Mapping[str, Tensors], inputs: RouteInputs, queries: Queries
    ) -> PromptPlan:
        """What the rows of a forward read. `queries` are zero where a view is absent; the pools are whole."""

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        kept = self._read(base, stage.past)
        earlier = joined(list(kept.values()), self.growing)
        fresh = self.draw(base, earlier)
        last = list(kept.values())[-1] if kept else {}
        shared = {name: pool for name, pool in last.items() if name not in self.growing}
        return self._injected(base, Prompts({**fresh, **shared}, earlier, [*kept, stage.name]))

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        pools = prompts_of(model).trained
        own = [p for name in self.growing for p in pools[name].parameters()]
        shared = [p for name in pools if name not in self.growing for p in pools[name].parameters()]
        kinds = (("prompts", own, train.weight_decay), ("shared prompts", shared, 0.0))
        return [
            {"params": params, "name": name, "peak": train.lr, "lr": 0.0, "weight_decay": decay}
            for name, params, decay in kinds
            if params
        ]

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        with routing(model, self.inputs(batch)) as route:
            logits = answer_logits(model, batch)
        counted = 0.0 if batch.filler else 1.0
        terms = {name: counted * term.sum() for name, term in route.plan.terms.items()}
        return {"answer": answer_loss_sum(logits, batch.labels)} | terms

    # ---- files
    def tensors(self, model: Any, stage: Stage) -> dict[str, Tensor]:
        pools = prompts_of(model).trained
        return {f"{pool}.{name}": p.detach() for pool in pools for name, p in pools[pool].named_parameters()}

    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: t.cpu().contiguous() for name, t in self.tensors(model, stage).items()}
        save_file(own, folder / TENSORS)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base
        kept = self._read(base, past)
        last = list(kept.values())[-1]
        pools = {name: pool for name, pool in last.items() if name not in self.growing}
        pools |= joined(list(kept.values()), self.growing)
        return self._injected(base, Prompts({}, pools, list(kept)))

    def _read(self, base: nn.Module, past: Mapping[str, Past]) -> dict[str, dict[str, Tensors]]:
        """Stage → pool → tensors, each proven to fit this base and these options.

        Raises:
            DeloError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
        """
        with torch.random.fork_rng(devices=[]):  # only the shapes are wanted
            drawn = self.draw(base, {}) if past else {}
        expected = {f"{pool}.{n}": t.shape for pool, tensors in drawn.items() for n, t in tensors.items()}
        kept: dict[str, dict[str, Tensors]] = {}
        for stage, known in past.items():
            what = f"The prompts of {stage}"
            found = read_tensors(known.folder / TENSORS, what, "train the stage again")
            report = tensor_report(expected, {name: t.shape for name, t in found.items()})
            if report:
                raise DeloError(
                    "\n".join([f"{what} do not fit:", *report]),
                    given=known.folder,
                    fix="use the base and configuration of the run",
                )
            kept[stage] = {
                pool: {n: found[f"{pool}.{n}"] for n in tensors} for pool, tensors in drawn.items()
            }
        return kept

    def _injected(self, base: Any, prompts: Prompts) -> nn.Module:
        base.requires_grad_(False)
        base.add_module("prompts", prompts.to(base.get_input_embeddings().weight.device))

        def decide(inputs: RouteInputs, queries: Queries) -> PromptPlan:
            return self.plan(base, prompts(), inputs, present(queries, inputs.presence))

        carrier = Carrier(decide)
        carrier.attach(base, self.backbone.projector_name)
        attach_prefixes(base, carrier)
        return base  # type: ignore[no-any-return]

    # ---- answers
    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        """Prompts are read as the rows' queries say; the bare base of the zero-shot row has none."""
        if find_carrier(model) is None:
            yield Prompt.of(batch)
            return
        told = list(tasks) if tasks is not None and self.capabilities.chooses_task else None
        with routing(model, self.inputs(batch, tasks=told, expand=beams)):
            yield Prompt.of(batch)

    def footprint(self, base: nn.Module) -> Footprint:
        with torch.random.fork_rng(devices=[]):
            drawn = self.draw(base, {})
        count = sum(tensor.numel() for tensors in drawn.values() for tensor in tensors.values())
        return Footprint(count, "lora", 1, 0, every_task=bool(self.growing))


def joined(kept: Sequence[Mapping[str, Tensors]], growing: Sequence[str]) -> dict[str, Tensors]:
    """The growing pools of several stages, one after the other; nothing for no stage."""
    if not kept:
        return {}
    return {
        name: {n: torch.cat([pools[name][n] for pools in kept]) for n in kept[0][name]} for name in growing
    }
