"""One resumable training loop for all three stages: AdamW, warm-up and cosine, JSONL log, a state file
every minute.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STATE = "state.safetensors"
"""A stage's weights and optimizer; the step and the rest are JSON in its metadata."""
SAVE_EVERY = 60.0
"""Seconds between state files."""
LOG_EVERY = 50
"""Steps between log lines."""


@dataclass(frozen=True)
class Plan:
    """Length and rate of a stage: it ends after `steps`, or after `minutes` of training time if that comes
    first.
    """

    steps: int
    minutes: float
    rate: float
    floor: float = 0.05
    warmup: int = 50
    measure_every: int = 400

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up, then a cosine from `rate` to `floor * rate` over the progress in
        [0, 1].
        """
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)


class Stage:
    """A stage's folder: `state.safetensors` (to go on from), `log.jsonl`, and `done.json` with the final
    measures when finished.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.progress = 0.0

    @property
    def finished(self) -> bool:
        """Whether the stage has ended."""
        return (self.folder / "done.json").exists()

    def log(self, **entry: object) -> None:
        """Append one line to the log."""
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @property
    def begun(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.folder / STATE).exists()

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state file in one move, so that a kill leaves the old or the new one."""
        part = self.folder / f"{STATE}.part"
        kept: dict[int, dict[str, Tensor]] = state["optimizer"]["state"]
        tensors = {f"model/{name}": tensor for name, tensor in state["model"].items()}
        tensors |= {f"optimizer/{i}/{key}": t for i, entry in kept.items() for key, t in entry.items()}
        numbers = {key: state[key] for key in ("step", "spent", "loss")}
        numbers["groups"] = state["optimizer"]["param_groups"]
        own = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # tied ones apart
        save_file(own, part, metadata={"state": json.dumps(numbers)})
        part.replace(self.folder / STATE)

    def load(self) -> dict[str, Any] | None:
        """The last saved state, if any."""
        if not self.begun:
            return None
        model: dict[str, Tensor] = {}
        kept: dict[int, dict[str, Tensor]] = {}
        with safe_open(self.folder / STATE, "pt") as file:
            numbers: dict[str, Any] = json.loads(file.metadata()["state"])
            for name in file.keys():  # noqa: SIM118
                part, _, rest = name.partition("/")
                if part == "model":
                    model[rest] = file.get_tensor(name)
                else:
                    index, _, key = rest.partition("/")
                    kept.setdefault(int(index), {})[key] = file.get_tensor(name)
        return numbers | {
            "model": model,
            "optimizer": {"state": kept, "param_groups": numbers.pop("groups")},
        }


def train(
    stage: Stage,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    measure: Callable[[], dict[str, float]],
    plan: Plan,
) -> None:
    """Train `model` by `loss(step)`; measure now and then and at the end. Goes on from the stage's state; a
    finished one only loads.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step, spent, running = 0, 0.0, 0.0
    if (state := stage.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, running = int(state["step"]), float(state["spent"]), float(state["loss"])
    model.train()
    began = saved = time.monotonic()
    if stage.finished:
        return
    while True:
        elapsed = spent + time.monotonic() - began
        stage.progress = max(step / plan.steps, elapsed / (60 * plan.minutes))
        if stage.progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step, stage.progress)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = 0.95 * running + 0.05 * value.item() if step > 1 else value.item()
        if step % LOG_EVERY == 0:
            measured = _measured(model, measure) if step % plan.measure_every == 0 else {}
            stage.log(step=step, seconds=round(elapsed, 1), loss=round(running, 4), **measured)
        if time.monotonic() - saved > SAVE_EVERY:
            stage.save(_state(model, optimizer, step, spent + time.monotonic() - began, running))
            saved = time.monotonic()
    stage.save(_state(model, optimizer, step, elapsed, running))
    final = {
        "steps": step,
        "seconds": round(elapsed, 1),
        "loss": running,
        "skills": _measured(model, measure),
    }
    stage.log(**final)
    (stage.folder / "done.json").write_text(json.dumps(final, indent=1), encoding="utf-8")


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, spent: float, loss: float
) -> dict[str, Any]:
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return parts | {"step": step, "spent": spent, "loss": loss}


def _measured(model: nn.Module, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    model.eval()
    found = {name: round(value, 3) for name, value in measure().items()}
    model.train()
    return found
