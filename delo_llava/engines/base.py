"""What training needs of an engine.

Loss convention: the caller hands over Σ_k w_k·sum_k / total_k for one micro-batch, totals taken over the
*global* batch. Every engine sums the gradients of micro-batches and ranks, so every global batch means the
same for any ranks × micro × accumulation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from delo_llava.engines.shards import OptimizerState
from delo_llava.methods.base import Trained


class Engine(Protocol):
    """One stage's forward, backward and update, over one or many processes."""

    module: nn.Module
    #: The engine's own file schedules the learning rates, so the loop must not.
    schedules: bool

    @property
    def optimizer(self) -> Any:
        """The optimiser whose `param_groups` hold the learning rates."""

    @property
    def trained(self) -> Trained:
        """The trained parameters as whole tensors."""

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss sums of one micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""

    def step(self) -> float | None:
        """Called after every micro-batch; at the last one of a global batch: clip, update, clear.

        Returns the global gradient norm before clipping at the last one, else None. Where it is not finite,
        nothing was updated, on any rank.
        """

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A block in which trainable parameters are whole on every rank (read-only)."""

    def gather_optimizer(self) -> OptimizerState:
        """The optimiser's state as whole tensors on the first rank; every rank must call it."""

    def load_optimizer(self, state: OptimizerState) -> None:
        """Go on from `state`; called before the first step, with the whole tensors on every rank."""

    def schedule_state(self) -> dict[str, Any] | None:
        """The state of the file's own schedule, as JSON holds it; None without one."""

    def load_schedule(self, state: dict[str, Any] | None) -> None:
        """Go on from what `schedule_state` gave."""

    def close(self, whole: bool = True) -> None:
        """Free everything the engine holds but the module.

        With `whole`, which every rank must call, the module is left plain: every parameter whole on every
        rank, no hook or attribute of the engine on it.
        """


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a `MethodModule`'s model by their names in it."""
    model = module.get_submodule("model")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
