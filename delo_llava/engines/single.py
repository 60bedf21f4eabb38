"""One process, plain AdamW: the reference for the other engines, and the one to debug with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.config import RunConfig
from delo_llava.engines.base import trained_parameters
from delo_llava.engines.optim import build_optimizer
from delo_llava.engines.shards import OptimizerState, deal_state, gather_state, whole_pieces
from delo_llava.methods.base import Trained


class SingleEngine:
    """The engine of one process."""

    schedules = False

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], config: RunConfig, accumulation: int
    ) -> None:
        self.module, self.clip, self._accumulation, self._micro = module, config.train.clip, accumulation, 0
        self._optimizer = build_optimizer(groups, config.train)
        self._parameters = [p for group in groups for p in group["params"]]

    @property
    def optimizer(self) -> Any:
        """The AdamW itself."""
        return self._optimizer

    @property
    def trained(self) -> Trained:
        """The parameters themselves."""
        return SingleTrained(trained_parameters(self.module), self._optimizer)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss sums of one micro-batch."""
        sums: dict[str, Tensor] = self.module(batch)
        return sums

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""
        loss.backward()

    def step(self) -> float | None:
        """Count the micro-batch; clip, update and clear at the last one."""
        self._micro = (self._micro + 1) % self._accumulation
        if self._micro:
            return None
        norm = nn.utils.clip_grad_norm_(self._parameters, self.clip or float("inf"))
        if bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Parameters are always whole here."""
        yield

    def gather_optimizer(self) -> OptimizerState:
        """The state as it is."""
        named = trained_parameters(self.module)
        return gather_state(self._optimizer, whole_pieces(self._parameters), named, lambda t: t, True)

    def load_optimizer(self, state: OptimizerState) -> None:
        """Copy the state in."""
        deal_state(self._optimizer, whole_pieces(self._parameters), trained_parameters(self.module), state)

    def schedule_state(self) -> dict[str, Any] | None:
        """The loop schedules."""
        return None

    def load_schedule(self, state: dict[str, Any] | None) -> None:
        """Nothing to load."""

    def close(self, whole: bool = True) -> None:
        """Drop optimiser state and gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()


class SingleTrained:
    """`Trained` over plain parameters.

    Args:
        parameters: by name.
        optimizer: keeps its moments under the parameters themselves.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        self._parameters, self._optimizer = parameters, optimizer

    def values(self) -> dict[str, Tensor]:
        """A copy of every parameter."""
        return {name: p.detach().float().clone() for name, p in self._parameters.items()}

    def gradients(self) -> dict[str, Tensor]:
        """What backward passes left; zero where they left nothing."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self._parameters.items()
        }

    def add_gradients(self, extra: Mapping[str, Tensor]) -> None:
        """Add to `grad`."""
        for name, value in extra.items():
            parameter = self._parameters[name]
            parameter.grad = value.clone() if parameter.grad is None else parameter.grad + value

    def rewrite(self, new: Mapping[str, Tensor]) -> None:
        """Copy into the parameters."""
        with torch.no_grad():
            for name, value in new.items():
                self._parameters[name].copy_(value)

    def reset_moments(self, where: Mapping[str, Tensor]) -> None:
        """Zero both moments under the masks."""
        for name, mask in where.items():
            for value in self._optimizer.state.get(self._parameters[name], {}).values():
                if torch.is_tensor(value) and value.dim():
                    value.masked_fill_(mask.to(value.device), 0.0)

    def sum(self, tensor: Tensor) -> Tensor:
        """There is one rank."""
        return tensor
