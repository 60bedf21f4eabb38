"""What a continual-learning method says: how it is built, what it minimises, what it stores, how it answers.

The engine and the harness know only this interface. A method is one file in this folder that ends in
`METHOD = MyMethod`; its options are the pydantic class `MyMethod.Config`, filled from the section of the run
configuration that carries the method's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.errors import DeloError

#: Sums a tensor over all ranks and returns the sum (the identity in one process).
Reduce = Callable[[Tensor], Tensor]


class MethodConfig(BaseModel):
    """Base of every method's options: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Capabilities:
    """What the harness must know before it evaluates.

    Attributes:
        chooses_task: the method picks the task per sample, so `matched` results exist beside `oracle` ones.
        needs_task: the method cannot answer without the true task, so only `oracle` results exist.
        isolated: every task has parameters of its own; adapters of earlier tasks stay bit-identical on disk.
    """

    chooses_task: bool = False
    needs_task: bool = False
    isolated: bool = False


@dataclass(frozen=True)
class Stage:
    """Stage `index` (from 0) trains `task`; `earlier` maps earlier tasks to their published folders."""

    index: int
    task: str
    earlier: dict[str, Path]


@dataclass(frozen=True)
class TaskChoice:
    """Per-sample task choice among `tasks`: `index` int64 B, `scores` float B×T (higher is likelier)."""

    tasks: tuple[str, ...]
    index: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Footprint:
    """What one stage of a method adds to a base, as `delo-llava plan` needs to know it.

    Attributes:
        parameters: trained by a stage, fp32.
        kind: `gathered`: factors are looked up for every row; `lora`: one pair of matrices for all rows.
        rank: of the update of a linear in a forward pass.
        stored_bytes: what a finished stage keeps on disk besides the trained parameters (statistics).
        every_task: evaluation holds the adapters of all finished tasks, not just the last one.
    """

    parameters: int
    kind: Literal["gathered", "lora"]
    rank: int
    stored_bytes: int
    every_task: bool


class Method(ABC):
    """One continual-learning method over a frozen base model."""

    capabilities: ClassVar[Capabilities] = Capabilities()
    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        self.options, self.run, self.backbone = options, run, backbone

    @abstractmethod
    def begin_task(self, base: nn.Module, stage: Stage) -> nn.Module:
        """Inject what `stage` trains into the freshly loaded frozen `base`, restoring what it needs of
        earlier stages.
        """

    #: `prepare` is called before the first step, with the task's first `preparation_records` complete records
    #: (None: all).
    wants_preparation: bool = False
    preparation_records: int | None = None
    #: The collator adds, to each batch, a view of the complete rows with one modality removed.
    wants_dropped_view: bool = False

    def prepare(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce) -> None:
        """See this rank's part of some training records once, without gradient, before the first step
        (statistics).
        """
        return None

    def checkpoint_context_fn(self, model: nn.Module) -> Callable[[], Any] | None:
        """`context_fn` of `torch.utils.checkpoint`, where recomputation needs a state of the forward pass;
        else None.
        """
        return None

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many items each loss term of `batch` averages over: known from labels and presence, before any
        forward.
        """
        if batch.labels is None:
            return {"answer": 0.0}
        return {"answer": float((batch.labels[:, 1:] != -100).sum())}

    def weights(self) -> dict[str, float]:
        """The weight of each loss term; the terms named here are those of `counts` and `loss_sums`."""
        return {"answer": 1.0}

    @abstractmethod
    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The sum (not the mean) of each loss term over its items, with gradient; called inside the engine's
        forward.
        """

    def after_backward(self, model: nn.Module, batch: Batch) -> None:
        """Called once for each micro-batch after its backward pass: running statistics belong here, not in a
        forward.
        """
        return None

    def end_task(self, model: nn.Module, reduce: Reduce) -> None:
        """Close the task: statistics that live on several ranks are summed here."""
        return None

    @abstractmethod
    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        """Write what this stage adds into `folder` (safetensors, JSON). Parameters are gathered already."""

    @abstractmethod
    def load(self, base: nn.Module, adapters: dict[str, Path]) -> nn.Module:
        """The model as it stands after the stages in `adapters` (task -> folder, in order); empty means the
        bare base.
        """

    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice | None:
        """The task of each sample, or None for methods without a choice. `views` limits the evidence (image,
        text, instruction).
        """
        return None

    def footprint(self, base: nn.Module) -> Footprint:
        """What a stage over `base` (which may be on the meta device) trains and stores.

        Raises:
            DeloError: the method does not say.
        """
        raise DeloError(
            "This method does not say what it needs, so it cannot be planned",
            given=type(self).__name__,
            fix="implement its footprint()",
        )

    @abstractmethod
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> AbstractContextManager[Any]:
        """A context in which `model(**batch.inputs)` or `model.generate(**batch.inputs)` answers as the given
        tasks (one per row).
        """

    def routing_use(self, model: nn.Module) -> dict[str, Any] | None:
        """What was routed in `answering` since the last call, each of which starts the count anew; None for
        methods that do not route, and when nothing was answered.

        Returns:
            `layers`: modality -> names of the adapted linears; `pools`: a list of `task` (whose pool),
            `modality`, `present` (in the samples), `part` (A or B), `rows` (samples) and `counts` (for each
            linear, how often each of its factors was chosen).
        """
        return None


def answer_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy over trained positions.

    Args:
        logits: B×S×V.
        labels: B×S, -100 where not trained.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
