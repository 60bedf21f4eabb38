"""One stage in memory: a model as a method built it, its examples and an engine in; trained tensors out.

The run on disk (`runs.stage`) and a federated client call this same function: it knows no folder.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Collator, Layout
from delo_llava.data.images import dummy_image
from delo_llava.data.omitted import CutRecords
from delo_llava.data.sampler import plan_accumulation
from delo_llava.engines.base import Engine
from delo_llava.engines.build import build_engine
from delo_llava.engines.deepspeed import zero_stage
from delo_llava.engines.dummy_image import DummyImage
from delo_llava.engines.module import MethodModule
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.watchdog import watched
from delo_llava.methods.base import Method, Mixture
from delo_llava.training.guards import fingerprint, frozen_parameters, require_unchanged
from delo_llava.training.lengths import token_lengths
from delo_llava.training.loop import Ledger, Observer, StepReport, run_steps
from delo_llava.training.mixture import StageBatches, StagePasses

#: Ranks that a checkpoint has no random state for, as there were fewer, are seeded this far apart by step.
RANK_SEEDS = 1_000_003


class Resumed(Protocol):
    """A stage that was left between two steps, as one rank reads it."""

    step: int

    @property
    def method(self) -> dict[str, Tensor]:
        """What `Method.state_dict` gave."""

    def ledger(self) -> Ledger:
        """The record of the steps before."""

    def load_weights(self, model: nn.Module) -> None:
        """Copy the trained parameters into the model; before an engine shards them."""

    def load_engine(self, engine: Engine) -> None:
        """Give the optimiser and the file's schedule their state back."""

    def load_random(self) -> bool:
        """Set this rank's random states; False if it has none here."""


@dataclass(frozen=True)
class Running:
    """What an observer is told of a stage before its first step: `start` is the first one of this launch."""

    engine: Engine
    collator: Collator
    ledger: Ledger
    steps: int
    examples: int
    start: int


#: Makes the observer of a stage.
Observe = Callable[[Running], Observer]


@dataclass(frozen=True)
class Fitted:
    """A stage that was trained.

    Attributes:
        model: plain again, every parameter whole on every rank.
        examples: how many the stage's own part has (what an average over clients is weighted by).
        ledger: learning rates, steps left out, bad images.
        trainable: number of trained parameters.
    """

    model: nn.Module
    method: Method
    examples: int
    steps: int
    ledger: Ledger
    trainable: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters by their names in the model, on the CPU."""
        return {n: p.detach().cpu().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def state(self) -> dict[str, Tensor]:
        """What the method holds besides."""
        return self.method.state_dict()


@dataclass
class Silent:
    """An observer that writes nothing; `reports` are kept."""

    reports: list[StepReport] = field(default_factory=list)

    def step(self, report: StepReport) -> None:
        """Keep it."""
        self.reports.append(report)

    def skipped(self, step: int, record_ids: list[str]) -> None:
        """The ledger has it."""

    def save(self, step: int) -> None:
        """Without checkpoints there is nothing to go on from."""


@dataclass(frozen=True)
class Kit:
    """What turns examples into batches of one base: its family's backbone and the processor of its
    checkpoint.

    Attributes:
        rooms: most tokens of an answer by task, see `Collator`.
    """

    backbone: Backbone
    processor: Any
    rooms: Mapping[str, int] = field(default_factory=dict)

    def collator(self, config: RunConfig, *, generation: bool = False) -> Collator:
        """A fresh collator, for training or for questions alone."""
        return Collator(
            self.backbone,
            self.processor,
            config.data.max_length,
            config.missing.image,
            generation=generation,
            skip_bad_images=config.data.on_bad_image == "skip" and not generation,
            rooms=self.rooms,
        )

    def dummy_layout(self) -> Layout:
        """What the placeholder of the dummy picture becomes."""
        return self.backbone.encode_image(self.processor, dummy_image()).layout

    def tiny_image(self) -> dict[str, torch.Tensor]:
        """Model inputs of a picture of no meaning."""
        return self.backbone.tiny_image(self.processor)


def fit(
    model: nn.Module,
    method: Method,
    mixture: Mixture,
    config: RunConfig,
    ranks: Ranks,
    kit: Kit,
    *,
    seed: int,
    resumed: Resumed | None = None,
    observe: Observe = lambda running: Silent(),
) -> Fitted:
    """Train one stage; every rank calls it.

    Args:
        model: as `method.begin` gave it, on this rank's device.
        mixture: what is trained on; the first part are the stage's own examples, of which statistics are
            made.
        config: decides batches, rates and engine; nothing is written.
        seed: of the stage; decides the order of examples and every random number.
        resumed: where an earlier launch left the stage.
        observe: who is told of every step (and saves checkpoints).

    Raises:
        DeloError: what the guards find, raised on every rank.
        Preempted: a rank was asked to leave; the observer has saved the stage.
    """
    with watched(ranks, config.train.patience) as at:
        return _Fit(model, method, config, ranks, kit, seed, resumed, observe, at).run(mixture)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class _Fit:
    """What `fit` was given; `at` tells the watchdog where this rank stands."""

    model: nn.Module
    method: Method
    config: RunConfig
    ranks: Ranks
    kit: Kit
    seed: int
    resumed: Resumed | None
    observe: Observe
    at: Callable[[str], None]

    def run(self, mixture: Mixture) -> Fitted:
        """Statistics, steps, statistics."""
        model, method, config, ranks = self.model, self.method, self.config, self.ranks
        own = mixture[0].examples
        start, ledger = self._begun()
        passes = StagePasses(own, config, ranks, lambda: self.kit.collator(config), ledger, self.seed)
        lengths = self._lengths(mixture) if config.data.lengths == "tokens" else None
        batches = StageBatches(config, mixture, self.seed, lengths)
        self.at("preparing")
        if self.resumed is not None:
            self.resumed.load_weights(model)
            method.load_state_dict(model, self.resumed.method)
        else:
            method.prepare(model, passes, ranks.sum)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        groups = method.groups(model, config.train)
        if groups:
            self._engaged(groups, batches, start, ledger)
        self.at("finishing")
        method.finish(model, passes, ranks.sum)
        return Fitted(model, method, len(own), len(batches.steps) if groups else 0, ledger, trainable)

    def _lengths(self, mixture: Mixture) -> list[int]:
        """Tokens of all examples of the mixture, one part after the other."""
        self.at("measuring lengths")
        parts = (token_lengths(part.examples, self.config, self.ranks, self.kit) for part in mixture)
        return [length for part in parts for length in part]

    def _begun(self) -> tuple[int, Ledger]:
        """The first step to train and what is known of the steps before it."""
        if self.resumed is None:
            return 0, Ledger()
        ledger = self.resumed.ledger()
        ledger.resumed.append(self.resumed.step)
        if not self.ranks.first:
            # The first rank keeps those of all; this one's own come again.
            ledger.bad_images, ledger.cut = {}, CutRecords()
        return self.resumed.step, ledger

    def _engaged(
        self, groups: list[dict[str, Any]], batches: StageBatches, start: int, ledger: Ledger
    ) -> None:
        """The steps in an engine, which is gone afterwards."""
        stage = zero_stage(self.config)
        dummy = DummyImage(self.model, self.kit.tiny_image()) if stage == 3 else None
        module = MethodModule(self.model, self.method, touch_all=stage < 3)
        train = self.config.train
        accumulation = plan_accumulation(train.global_batch, train.micro_batch, self.ranks.world)
        engine = build_engine(module, groups, self.config, self.ranks, accumulation)
        try:
            self._steps(engine, module, batches, start, ledger)
        except BaseException:
            engine.close(whole=False)  # the other ranks may not be there to put parameters together
            raise
        engine.close()
        if dummy is not None:
            dummy.remove()

    def _steps(
        self, engine: Engine, module: MethodModule, batches: StageBatches, start: int, ledger: Ledger
    ) -> None:
        """The steps of the stage; what was frozen before them is proven to be the same afterwards."""
        self._restore(engine, start)
        collator = self.kit.collator(self.config)
        running = Running(engine, collator, ledger, len(batches.steps), len(batches.examples), start)
        observer = self.observe(running)
        before = fingerprint(frozen_parameters(module.model))
        mine = batches.mine(self.ranks, collator, module.method, start)
        run_steps(
            engine, module, mine, batches.clock, self.config.train, self.ranks, observer,
            start=start, ledger=ledger, at=self.at,
        )  # fmt: skip
        require_unchanged(before, fingerprint(frozen_parameters(module.model)))

    def _restore(self, engine: Engine, start: int) -> None:
        """Set the random states, and the engine's where an earlier launch left the stage."""
        seed_everything(self.seed + 1 + self.ranks.rank + RANK_SEEDS * start)
        if self.resumed is not None:
            self.resumed.load_engine(engine)
            self.resumed.load_random()
