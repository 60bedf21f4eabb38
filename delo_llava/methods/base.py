"""What a continual-learning method says: how it is built, what it minimises, what it stores, how it answers.

The trainer and the harness know only this interface, and ask capabilities, never names. A method is one file
or folder here whose module ends in `METHOD = MyMethod`; its options are the pydantic class `MyMethod.Config`,
filled from the section of the run configuration that carries the method's name. A hook that a method does not
override costs nothing: no gradient is gathered and no parameter copied for it.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft.utils import get_peft_model_state_dict
from pydantic import ConfigDict
from torch import Tensor, nn

from delo_llava.adapters.carrier import checkpoint_contexts
from delo_llava.adapters.merging import adapter_updates
from delo_llava.adapters.unmergeable import PER_SAMPLE, PER_TASK, cannot_merge
from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig, TrainConfig
from delo_llava.data.collate import Batch
from delo_llava.data.examples import Examples, Item, View
from delo_llava.methods._access import Passes as Passes
from delo_llava.methods._access import Reduce as Reduce
from delo_llava.methods._access import Trained as Trained
from delo_llava.methods._answers import answer_logits as answer_logits
from delo_llava.methods._answers import answer_loss_sum as answer_loss_sum
from delo_llava.methods._choice import TaskChoice as TaskChoice
from delo_llava.methods._groups import parameter_groups
from delo_llava.schema import Worded
from delo_llava.tasks import StagePlan as StagePlan
from delo_llava.tasks import TaskSequence, TaskSpec

#: Names in `Method.state_dict` that begin so are one rank's part: of a sum over ranks, of all ranks' rows.
SUMMED, ROWS = "sum/", "rows/"


class MethodConfig(Worded):
    """Base of every method's options: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Capabilities:
    """What trainer and harness must know of a method.

    Attributes:
        chooses_task: the method picks the task per sample, so `matched` results exist beside `oracle` ones.
        needs_task: the method cannot answer without the true task, so only `oracle` results exist.
        isolated: what a stage trains answers for its own tasks alone, whatever is trained later.
        answers_as_trained: after a stage, the model that answers is the function that was trained; False
            where answers put the stages together in another way.
        mergeable: what is trained adds the same matrix to a linear's weight for every sample and token, so it
            can be folded into it (`Method.updates`).
        starts_as_base: what the first stage injects changes nothing before its first step; False where no
            start is neutral (a prefix takes a share of every softmax).
        transductive: an answer may depend on the other samples of its batch (a paper's batch form, as an
            option).
        encoders: folders of the models that frozen features come from in place of the base's own tower and
            embeddings.
    """

    chooses_task: bool = False
    needs_task: bool = False
    isolated: bool = False
    answers_as_trained: bool = True
    mergeable: bool = False
    starts_as_base: bool = True
    transductive: bool = False
    encoders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Past:
    """A finished stage: where its files are, and what it was trained on."""

    folder: Path
    tasks: tuple[TaskSpec, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Stage `index` (from 0) trains `tasks`; `past` maps the names of earlier stages to what they left.

    Attributes:
        seed: of this stage; the same on every rank.
    """

    index: int
    name: str
    tasks: tuple[TaskSpec, ...] = ()
    past: Mapping[str, Past] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Clock:
    """Where a stage stands: optimiser step `step` (from 0) of `steps`, of which `epoch_steps` make an
    epoch.
    """

    step: int
    steps: int
    epoch_steps: int

    @property
    def epoch(self) -> int:
        """Number of whole epochs before this step."""
        return self.step // max(1, self.epoch_steps)


@dataclass(frozen=True)
class Part:
    """Examples of a mixture; `share` is theirs of every global batch, None takes them in with the others."""

    examples: Examples
    share: float | None = None


#: What a stage trains on; the first part's number of examples decides the number of steps.
Mixture = tuple[Part, ...]


@dataclass(frozen=True)
class Prompt:
    """What the model is given to answer.

    Attributes:
        inputs: keyword arguments of `model(...)` and `model.generate(...)`.
        skip: positions at the beginning of what `generate` returns that are no answer.
    """

    inputs: Mapping[str, Any]
    skip: int

    @classmethod
    def of(cls, batch: Batch) -> "Prompt":
        """The batch as it is."""
        return cls(batch.inputs, batch.inputs["input_ids"].shape[1])


@dataclass(frozen=True)
class Footprint:
    """What one stage of a method adds to a base, as `delo-llava plan` needs to know it.

    Attributes:
        parameters: trained by a stage, fp32.
        kind: `gathered`: factors are looked up for every row; `lora`: one pair of matrices for all rows.
        rank: of the update of a linear in a forward pass.
        stored_bytes: what a finished stage keeps on disk besides the trained parameters (statistics).
        every_task: evaluation holds the adapters of all finished stages, not just the last one.
        untrained: numbers of its adapter that no step trains (a ridge map), fp32.
        held: bytes that a step keeps for the backward pass besides what its linears do, whatever the rows.
    """

    parameters: int
    kind: Literal["gathered", "lora"]
    rank: int
    stored_bytes: int
    every_task: bool
    untrained: int = 0
    held: int = 0


class Method(ABC):
    """One continual-learning method over a frozen base model."""

    capabilities: Capabilities = Capabilities()  # of an instance, where its options change them
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    unmerged: ClassVar[tuple[str, str]] = PER_SAMPLE  # why it is not `mergeable`, and what to do instead

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        self.options, self.run, self.backbone = options, run, backbone

    @property
    def why_unmerged(self) -> tuple[str, str]:
        """Why its adapters cannot be folded into the base's weights, and what to do instead."""
        return PER_TASK if self.capabilities.needs_task else self.unmerged

    def refuses(self) -> Mapping[str, str]:
        """Settings that it cannot work with, by its options -> why; a key such as `zero=3`."""
        return {}

    # ---- what is trained on
    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        """The stages of a sequence; by default one per task. None at all is legal."""
        return tuple(StagePlan(name, (name,)) for name in sequence.names)

    def mixture(self, stage: Stage, own: Examples, past: Mapping[str, Examples]) -> Mixture:
        """Which examples, in which shares. `past` reads an earlier stage's examples when it is asked for
        them.
        """
        return (Part(own),)

    def views(self, items: Sequence[Item], clock: Clock) -> Mapping[str, View]:
        """Further views of a micro-batch's rows, collated into `Batch.views`; always of the same names."""
        return {}

    def remarks(self, own: Mapping[str, Examples]) -> list[str]:
        """What should be known before anything is trained, from each stage's examples by its name: what of
        them the method cannot use.
        """
        return []

    # ---- a stage
    @abstractmethod
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        """Inject what `stage` trains into the freshly loaded frozen `base`, restoring what it needs of the
        past.
        """

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """See training examples, without gradient, before the first step (statistics)."""
        return None

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        """The trainable parameters in groups with `name` and peak rate `peak`; empty: nothing is trained by
        steps.
        """
        return parameter_groups(model, self.backbone.projector_pattern, train)

    def checkpoint_context_fn(self, model: nn.Module) -> Callable[[], Any] | None:
        """`context_fn` of `torch.utils.checkpoint`, where recomputation needs a state of the forward pass."""
        return checkpoint_contexts(model)

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many items each loss term of `batch` averages over: known from labels and presence, before any
        forward.
        """
        if batch.labels is None:
            return {"answer": 0.0}
        return {"answer": float((batch.labels[:, 1:] != -100).sum())}

    def weights(self, clock: Clock) -> dict[str, float]:
        """The weight of each loss term and penalty; the terms are those of `counts`, `loss_sums`,
        `penalties`.
        """
        return {"answer": 1.0}

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The sum (not the mean) of each loss term over its items, with gradient; called inside the engine's
        forward. By default next-token cross-entropy over the answers' tokens.
        """
        assert batch.labels is not None
        return {"answer": answer_loss_sum(answer_logits(model, batch), batch.labels)}

    def penalties(self, values: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """Terms over the trained parameters alone, once an update; `values` are whole and carry gradients."""
        return {}

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        """Called once for each micro-batch that counts, after its backward pass: running statistics belong
        here, not in a forward. Not on every rank alike, so no collective may be called.
        """
        return None

    def before_step(self, trained: Trained, clock: Clock) -> None:
        """Before an update: statistics of the gradient, or surgery on it."""
        return None

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        """After an update that was made: it may be projected (`before` holds the values it began with)."""
        return None

    def left_out(self, clock: Clock) -> None:
        """On every rank, after a step that made no update (not finite): what it counted is taken back."""
        return None

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Close the stage. The engine is gone, parameters are whole, autograd is plain: Fisher, anchors,
        SVD.
        """
        return None

    # ---- what is kept
    def state_dict(self) -> dict[str, Tensor]:
        """What the method holds between two steps of a stage beside the trainable parameters, for a step
        checkpoint.

        Names that begin with `SUMMED` are this rank's part of sums, those with `ROWS` its rows: each rank
        stores its own, and they are added up or joined when the stage goes on with another number of ranks.
        The others are equal on every rank.
        """
        return {}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave: called after `begin`, in place of `prepare`, whose buffers must
        be set again here.
        """
        return None

    def tensors(self, model: Any, stage: Stage) -> dict[str, Tensor]:
        """What `save` writes into `adapter_model.safetensors`, by name, as it is in memory: published files
        are compared with it. By default PEFT's adapter of the stage's name, or the model's first one.
        """
        name = stage.name if stage.name in model.peft_config else next(iter(model.peft_config))
        found: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
        return found

    @abstractmethod
    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        """Write what this stage adds into `folder` (safetensors, JSON); parameters are whole."""

    @abstractmethod
    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        """The model as it stands after the stages in `past` (in order); empty means the bare base."""

    # ---- answers
    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice | None:
        """The task of each sample, or None for methods without a choice. `views` limits the evidence (image,
        text, instruction).
        """
        return None

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        """A context in which `model` or `model.generate` with the prompt's inputs answers as the given tasks
        (one per row). By default the batch as it is, whatever the task.
        """
        yield Prompt.of(batch)

    def updates(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What is added to each adapted linear's weight, by its name in the base, d_out×d_in, float64: of a
        model as `load` gives it, one after the other, for methods that say they are `mergeable`.

        Raises:
            DeloError: this method is not; why, and what to do instead.
        """
        if not self.capabilities.mergeable:
            raise cannot_merge(self.run.method, self.why_unmerged)
        return adapter_updates(model)

    def routing_use(self, model: nn.Module) -> dict[str, Any] | None:
        """What was routed in `answering` since the last call, each of which starts the count anew; None for
        methods that do not route, and when nothing was answered.

        Returns:
            `layers`: modality -> names of the adapted linears; `pools`: a list of `task` (whose pool),
            `modality`, `present` (in the samples), `part` (A or B), `rows` (samples) and `counts` (for each
            linear, how often each of its factors was chosen).
        """
        return None

    def footprint(self, base: nn.Module) -> Footprint:
        """What a stage over `base` (which may be on the meta device) trains and stores; by default counted on
        what `begin` injects.
        """
        model = self.begin(copy.deepcopy(base), Stage(0, "planned"))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        widths = sum(i + o for i, o in adapted_linears(base, self.backbone).values())
        return Footprint(trained, "lora", max(1, round(trained / widths)), 0, self.capabilities.isolated)


def overrides(method: Method, hook: str) -> bool:
    """Whether a method has a hook of its own: what it needs is gathered only then."""
    return getattr(type(method), hook) is not getattr(Method, hook)
