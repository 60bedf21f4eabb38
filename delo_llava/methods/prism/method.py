"""PRISM in one process or over ranks; its head is in the folder's `__init__.py`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.methods._experts import ExpertOptions, TokenExperts
from delo_llava.methods.base import Clock, Footprint, Passes, Reduce, Stage, Trained
from delo_llava.methods.prism.protection import Protection, Room
from delo_llava.methods.prism.sides import sides_of


class PrismOptions(ExpertOptions):
    """Options of PRISM; symbols of the paper in brackets.

    Attributes:
        top_k: experts that act on a token; 0: all.
        bases: a square linear has one basis for the gradients of A and B, as in the paper (`shared`), or one
            for each (`two`, as linears that are not square always have).
        budget: directions that each basis keeps until interference is known [b].
        sketch: rows of the streaming covariance of each expert; also the most directions that a basis keeps.
        share: of the effective rank of a layer's gradients that may be kept [0.75].
        total: directions over all layers, dealt in proportion to their squared interference; None: every
            layer keeps as many as it may.
        warmup_epochs: until the projection has its full strength, growing linearly in steps; 0: from the
            first step on. Interference is measured while it grows, or in the first epoch.
    """

    top_k: int = Field(1, ge=0)
    bases: Literal["shared", "two"] = "shared"
    budget: int = Field(14, ge=1)
    sketch: int = Field(28, ge=1)
    share: float = Field(0.75, gt=0, le=1)
    total: int | None = Field(None, ge=1)
    warmup_epochs: float = Field(1.0, ge=0)


class Prism(TokenExperts):
    """Token-routed experts whose router stays after the first task, and whose updates leave out the
    directions that earlier tasks' gradients had.
    """

    Config = PrismOptions

    def __init__(self, options: PrismOptions, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self.room = Room(options.budget, options.sketch, options.share, options.total)
        self.protection = Protection((), options.experts, self.room)
        self._mask: Tensor | None = None
        self._seen: dict[str, Tensor] = {}
        self._mass: dict[str, Tensor] = {}

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        model = super().begin(base, stage)
        shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        sides = sides_of(shapes, self.options.bases == "shared")
        self.protection = Protection(sides, self.options.experts, self.room)
        self._seen, self._mass = {}, {}
        if stage.past:
            self.protection.load(list(stage.past.values())[-1].folder)
            for name, parameter in model.named_parameters():
                if ".lowrank_R." in name:
                    parameter.requires_grad_(False)
        return model

    # ---- routing mass: the mean weight of each expert over the tokens of a step
    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self._mask = batch.inputs["attention_mask"]
        return super().loss_sums(model, batch)

    def routed(self, layer: LowRankLayer, gate: Tensor) -> None:
        if not layer.training:
            return
        weights = gate.detach().double()
        if not layer.projector:  # the projector's tokens are all of images; here some are padding
            assert self._mask is not None
            weights = weights * self._mask.unsqueeze(-1)
            count = self._mask.sum()
        else:
            count = weights.new_tensor(weights.shape[:-1].numel())
        # Kept for after_backward: a forward may run twice under checkpointing and must not count anything.
        self._seen[layer.name] = torch.cat([weights.flatten(0, -2).sum(0), count.double().view(1)])

    def after_backward(self, model: nn.Module, batch: Batch, clock: Clock) -> None:
        images = len(batch.image_rows) > 0
        projector = self.backbone.projector_name
        for name, part in self._seen.items():
            if images or not name.startswith(f"{projector}."):  # without images, those are a dummy's
                self._mass[name] = self._mass.get(name, torch.zeros_like(part)) + part
        self._seen = {}

    def _masses(self, trained: Trained, device: torch.device) -> dict[str, Tensor]:
        """The routing mass of this step over all ranks, which then counts anew."""
        linears = sorted({side.linear for side in self.protection.sides})
        nothing = torch.zeros(self.options.experts + 1, dtype=torch.float64, device=device)
        summed = trained.sum(torch.stack([self._mass.get(name, nothing) for name in linears]))
        self._mass = {}
        means = summed[:, :-1] / summed[:, -1:].clamp(min=1)
        return dict(zip(linears, means, strict=True))

    # ---- gradients and updates
    def before_step(self, trained: Trained, clock: Clock) -> None:
        gradients = trained.gradients()
        masses = self._masses(trained, next(iter(gradients.values())).device)
        if not bool(torch.stack([g.isfinite().all() for g in gradients.values()]).all()):
            return  # the same on every rank; no update comes of this step either
        self.protection.observe(gradients, masses, clock.step < (self._warmup(clock) or clock.epoch_steps))

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        if self.protection.bases:
            strength = min(1.0, (clock.step + 1) / max(1, self._warmup(clock)))
            trained.rewrite(self.protection.project(before, trained.values(), strength))

    def _warmup(self, clock: Clock) -> int:
        """Steps until the projection has its full strength."""
        epochs: float = self.options.warmup_epochs
        return round(epochs * clock.epoch_steps)

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        known = self.protection
        known.unite([known.factors()], [1.0], known.ranks(), known.interference())

    # ---- what is kept
    def state_dict(self) -> dict[str, Tensor]:
        return self.protection.running()

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.protection.resume(state)

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        self.protection.save(folder)

    def footprint(self, base: nn.Module) -> Footprint:
        """The bases at their widest."""
        shared = self.options.bases == "shared"
        sizes = adapted_linears(base, self.backbone).values()
        widths = [d for i, o in sizes for d in ((i,) if shared and i == o else (i, o))]
        columns = [self.room.most(width) for width in widths]
        stored = sum(c * (4 * d + 8) for c, d in zip(columns, widths, strict=True))
        return replace(super().footprint(base), stored_bytes=self.options.experts * stored)
