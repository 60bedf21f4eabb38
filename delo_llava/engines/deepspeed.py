"""DeepSpeed's ZeRO stages behind `Engine`."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, distributed, nn

from delo_llava.config import RunConfig
from delo_llava.engines.base import trained_parameters
from delo_llava.engines.group import import_deepspeed
from delo_llava.engines.optim import build_optimizer
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.sharded import ShardedTrained, forget_gradients, make_plain
from delo_llava.engines.shards import (
    OptimizerState,
    Piece,
    deal_state,
    gather_state,
    zero3_pieces,
    zero12_pieces,
)
from delo_llava.errors import DeloError
from delo_llava.methods.base import Trained
from delo_llava.registry import load_plugin

#: Sections of a DeepSpeed file that would silently replace our optimiser and schedule.
OVERRIDING = ("optimizer", "scheduler")
#: Keys of a DeepSpeed file that the run's configuration decides; there they may only be absent or "auto".
PINNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
)

#: ZeRO stages that a file may name.
STAGES = (1, 2, 3)


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 1, 2 or 3 around our own AdamW."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        config: RunConfig,
        ranks: Ranks,
        accumulation: int,
    ) -> None:
        deepspeed = import_deepspeed(ranks.device)
        settings = deepspeed_settings(config, accumulation, ranks.device)
        self.module, self._deepspeed, self._scale = module, deepspeed, ranks.world * accumulation
        self._own = {id(p): set(vars(p)) for p in module.parameters()}
        self._ranks = ranks
        self.schedules = "scheduler" in settings
        # Taken before DeepSpeed sees the groups: ZeRO-3 empties them.
        self._parameters = [p for group in groups for p in group["params"]]
        ours: dict[str, Any] = {"optimizer": build_optimizer(groups, config.train)}
        if "optimizer" in settings:
            ours = {"model_parameters": groups}
        self._engine, *_ = deepspeed.initialize(
            model=module, config=settings, dist_init_required=False, **ours
        )
        self._check(settings["zero_optimization"]["stage"], ranks.world)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper; its `param_groups` are those of our AdamW."""
        return self._engine.optimizer

    @property
    def trained(self) -> Trained:
        """Put together from the ranks' parts."""
        return ShardedTrained(
            self._engine.optimizer, trained_parameters(self.module), self._pieces(), self._ranks, self._stage
        )

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss sums of one micro-batch, through DeepSpeed's hooks."""
        sums: dict[str, Tensor] = self._engine(batch)
        return sums

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient; DeepSpeed's averages over ranks and accumulation are undone."""
        self._engine.backward(loss * self._scale)

    def step(self) -> float | None:
        """DeepSpeed counts micro-batches itself and updates at the accumulation boundary."""
        last = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if not last:
            return None
        if self._stage == 3:
            forget_gradients(self._engine.optimizer)
        # DeepSpeed leaves an update with a gradient that is not finite out, without a word; ZeRO-3 then still
        # tells the norm of the step before.
        return float(self._engine.get_global_grad_norm() or 0.0) if self._engine.was_step_applied() else nan

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Parameters whole on every rank: under ZeRO-3 they are gathered for the block."""
        parts = [p for p in self._parameters if hasattr(p, "ds_id")]
        with self._deepspeed.zero.GatheredParameters(parts, modifier_rank=None, enabled=bool(parts)):
            yield

    def gather_optimizer(self) -> OptimizerState:
        """Gathered from the ranks' partitions, one parameter after the other."""
        return gather_state(
            self._inner(), self._pieces(), trained_parameters(self.module), self._ranks.sum, self._ranks.first
        )

    def load_optimizer(self, state: OptimizerState) -> None:
        """Fill this rank's partitions."""
        deal_state(self._inner(), self._pieces(), trained_parameters(self.module), state)

    def schedule_state(self) -> dict[str, Any] | None:
        """That of the scheduler in the DeepSpeed file."""
        state: dict[str, Any] | None = self._engine.lr_scheduler.state_dict() if self.schedules else None
        return state

    def load_schedule(self, state: dict[str, Any] | None) -> None:
        """Set that scheduler, and the rates it gives."""
        if state is not None:
            self._engine.lr_scheduler.load_state_dict(state)

    def _inner(self) -> Any:
        return self._engine.optimizer.optimizer

    def _pieces(self) -> dict[int, Piece]:
        optimizer = self._engine.optimizer
        if self._stage == 3:
            return zero3_pieces(optimizer, self._parameters, self._ranks.rank)
        return zero12_pieces(optimizer)

    @property
    def _stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def close(self, whole: bool = True) -> None:
        """Destroy the engine and take everything of it off the module, so that the next stage starts on free
        memory. (`destroy` alone leaves two hooks on the module, which keep the engine alive, and ZeRO-3's
        parameters empty.)
        """
        if self._engine is None:
            return
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            hook.remove()
        self._engine.destroy()
        self._engine = None
        self._parameters = []
        if whole:
            make_plain(self.module, self._own)
        gc.collect()

    def _check(self, stage: int, world: int) -> None:
        """A wrong backend or world size trains each rank alone, silently: refuse it."""
        found = (
            type(self._engine).__name__,
            self._engine.zero_optimization_stage(),
            distributed.get_world_size(),
        )
        if found != ("DeepSpeedEngine", stage, world):
            raise DeloError(
                "DeepSpeed built another engine than asked for",
                given=found,
                allowed=[("DeepSpeedEngine", stage, world)],
            )


def read_deepspeed_file(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed file of the run, checked for what the run's configuration must decide.

    Raises:
        DeloError: no such file, not JSON, an optimizer or scheduler section that was not asked for, a pinned
            key, or no ZeRO stage.
    """
    path = config.ds_config or Path(str(load_plugin("zero", config.zero)))
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
        zero = settings.get("zero_optimization", {})
        zero.get("stage")
    except (OSError, ValueError, AttributeError) as error:  # the last for what is no object
        raise DeloError(f"The DeepSpeed file cannot be read: {error}", given=path) from error
    for key in OVERRIDING:
        if key in settings and not config.allow_ds_optimizer:
            raise DeloError(
                f"The DeepSpeed file has a section `{key}`, which would silently replace the recipe's",
                given=path,
                fix=f"remove `{key}`, or pass --allow_ds_optimizer true",
            )
    for key in PINNED:
        if settings.get(key, "auto") != "auto":
            raise DeloError(
                f"`{key}` is decided by the run's configuration, not by the DeepSpeed file",
                given=path,
                fix=f"remove `{key}`",
            )
    if zero.get("compute_grad_norm") is False:
        raise DeloError(
            "The gradient norm is needed to notice gradients that are not finite",
            given=path,
            fix="remove `compute_grad_norm`",
        )
    stage = zero.get("stage")
    if type(stage) is not int or stage not in STAGES:
        told = (
            "The DeepSpeed file names no ZeRO stage" if stage is None else f"There is no ZeRO stage {stage!r}"
        )
        raise DeloError(told, given=path, fix='write "zero_optimization": {"stage": 2} (or 1, 3)')
    return settings


def check_deepspeed_file(config: RunConfig) -> None:
    """Let DeepSpeed itself look at the file's ZeRO section.

    Raises:
        DeloError: as `read_deepspeed_file`; a key that DeepSpeed does not know, or a value that it refuses.
    """
    settings = read_deepspeed_file(config)
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    deepspeed = import_deepspeed(torch.device("cpu" if cpu else "cuda"))
    try:
        deepspeed.runtime.zero.config.get_zero_config(settings)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        place = ".".join(("zero_optimization", *map(str, first["loc"])))
        raise DeloError(
            f"DeepSpeed refuses `{place}`: {first['msg']}",
            given=f"{config.ds_config or config.zero}: {first['input']!r}",
            fix="correct the DeepSpeed file",
        ) from error


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage of the run's DeepSpeed file; 0 for the one-process engine."""
    return 0 if config.zero == "none" else int(read_deepspeed_file(config)["zero_optimization"]["stage"])


def engine_name(config: RunConfig) -> str:
    """What trains a stage, as `zero` names it; with a DeepSpeed file of the user's, the file's ZeRO stage."""
    own = config.ds_config is not None and config.zero != "none"
    return str(zero_stage(config)) if own else config.zero


def deepspeed_settings(config: RunConfig, accumulation: int, device: torch.device) -> dict[str, Any]:
    """The file's settings with batch sizes and clipping filled in.

    There is no bf16 section: the frozen base is loaded in its dtype and adapters stay fp32, which needs no
        loss
    scaling and no second master copy. ZeRO-3's own linear is switched off: it takes the place of torch's for
    the rest of the process, so that statistics and evaluations differed from those of a fresh one.
    """
    settings = {key: value for key, value in read_deepspeed_file(config).items() if key not in PINNED}
    settings["zero_optimization"]["memory_efficient_linear"] = False
    offload = settings["zero_optimization"].get("offload_optimizer")
    if offload is not None and device.type == "cpu":
        offload["pin_memory"] = False
    return settings | {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
