"""One method on one tiny family, trained through two tasks by `fit`; what the contract looks at."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import tiny_models
import torch
import training_support as support
from torch import Tensor, nn

from delo_llava.adapters.carrier import find_carrier
from delo_llava.backbones.base import find_backbone
from delo_llava.config import RunConfig, load_config
from delo_llava.data.collate import Batch, Collator
from delo_llava.data.examples import Examples, Item
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.engines.ranks import Ranks
from delo_llava.methods.base import Method, Past, Prompt, Stage
from delo_llava.registry import load_plugin
from delo_llava.runs.stage import checkpoint_activations, stage_seed
from delo_llava.training.fit import Kit, fit, seed_everything

#: Options of methods whose defaults are too wide for a tiny model.
SMALL: dict[str, dict[str, Any]] = {
    "delo": {"pool_size": 4, "rank": 2, "latent": 4, "ridge_samples": 8},
    # A choice of experts jumps where two weigh alike, and two ranks round otherwise than one process.
    "clmoe": {"rank": 8, "experts": 4, "top_k": 4},
    "cram": {"rank": 6, "slot_rank": 3, "least_rank": 2, "warmup": 0.5},
    "disco": {"rank": 4},
    "hide": {"rank": 4},
    "ewc": {"samples": 4},
    "replay": {"kept": 3},
    "keeplora": {"rank": 2, "energy": 0.3, "samples": 8},
    "missrag": {"kept": 3},
    "moelora": {"experts": 2},
    "mora": {"rank": 2},
    "mrlora": {"rank": 2, "kept": 3},
    "pclr": {"rank": 4, "pool": 1.5, "samples": 8, "shared_from": 2},
    "prism": {"experts": 2, "budget": 3, "sketch": 6},
    "dac": {"rank": 6, "latent": 8},
    "same": {"rank": 4, "experts": 2, "directions": 8, "warmup": 0.5, "refresh": 2},
    "smolora": {"rank": 8, "experts": 2},
    "l2p": {"pool_size": 3, "chosen": 2, "length": 2},
    "dualprompt": {"key_samples": 8},
    "coda_prompt": {"components": 4, "depth": 1.0, "ortho": 0.1},
    "rebq": {"components": 3, "length": 2},
    "map_prompts": {"length": 2},
    "simple_recipe": {"lr": 0.01, "replay": 3},
}
#: Always tried, on LLaVA: an expert method and a baseline; all else by --long or in turn.
CORE = ("delo", "lora")
#: Presence of a task's records in turn.
PRESENCE = ((True, True), (True, False), (False, True), (True, True))
TASKS = ("task0", "task1")
ALONE = Ranks(0, 1, torch.device("cpu"))


@cache
def recipe() -> Path:
    """The tiny sequence's file: two tasks of eight records."""
    return support.write_sequence(Path(mkdtemp()), records=8)


@cache
def records(task: str) -> list[Any]:
    """The training records of one task."""
    folder = recipe().parent
    sequence = load_sequence(str(recipe()), folder)
    return list(read_records(next(t for t in sequence.tasks if t.name == task), "train"))


def items(task: str) -> list[Item]:
    """Four records of a task, each with another presence."""
    return list(zip(records(task)[:4], PRESENCE, strict=True))


def examples(task: str) -> Examples:
    """All eight, which are shown in the same patterns."""
    return Examples(((records(task), np.array(PRESENCE * 2)),))


@dataclass
class Trained:
    """One stage after `fit`.

    Attributes:
        folder: what `save` wrote; hashes: of its files when they were written.
        model: as it was trained; start: its trained tensors before; end: after.
        own: numbers of the method's own modules by class.
    """

    folder: Path
    model: Any
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    own: dict[str, int]
    hashes: dict[str, str] = field(default_factory=dict)


class Bench:
    """One method over one tiny base."""

    #: On whose device it trains and answers.
    ranks: Ranks = ALONE

    def __init__(
        self, name: str, kind: str = "llava", quant: str = "none", *words: str, **options: Any
    ) -> None:
        self.kind, self.quant = kind, quant
        given = support.words(recipe(), tiny_models.session(kind), recipe().parent / "run")
        config = load_config(None, [*given, f"--quant={quant}", "--train.global_batch=4", *words])
        section = {**SMALL.get(name, {}), **options}
        methods = {"delo": SMALL["delo"], name: section}
        self.config: RunConfig = config.model_copy(update={"method": name, "methods": methods})
        self.backbone, self.path = find_backbone(tiny_models.session(kind))
        chosen: Any = load_plugin("method", name)
        self.method: Method = chosen(chosen.Config(**section), self.config, self.backbone)
        self.kit = Kit(self.backbone, self.backbone.load_processor(self.path))
        self.sequence = load_sequence(str(recipe()), recipe().parent)

    def base(self) -> Any:
        """A fresh base."""
        device, config = str(self.ranks.device), self.config
        return self.backbone.load(self.path, quant=config.quant, dtype=config.dtype, device=device)

    def stages(self) -> list[Stage]:
        """The stages of the sequence, whose past is still empty."""
        tasks = {task.name: task for task in self.sequence.tasks}
        plans = self.method.stages(self.sequence)
        return [
            Stage(i, plan.name, tuple(tasks[name] for name in plan.tasks), seed=stage_seed(0, i))
            for i, plan in enumerate(plans)
        ]

    def begin(self, stage: Stage) -> Any:
        """The model that `stage` begins with."""
        seed_everything(stage.seed)
        base = self.base()
        base.config.get_text_config().use_cache = False
        model = self.method.begin(base, stage)
        if self.config.train.gradient_checkpointing:
            checkpoint_activations(base, model, self.method)
        return model.train()

    def train(self, stage: Stage, folder: Path, **how: Any) -> Trained:
        """The stage by `fit`, which is also told `how`; its files in `folder`."""
        model = self.begin(stage)
        own = _own_modules(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        past = {name: _all(known) for name, known in stage.past.items()}
        mixture = self.method.mixture(stage, _all(Past(folder, stage.tasks)), past)
        fitted = fit(model, self.method, mixture, self.config, self.ranks, self.kit, seed=stage.seed, **how)
        end = dict(fitted.tensors)
        folder.mkdir(parents=True)
        self.method.save(fitted.model, stage, folder)
        fitted.model.config.get_text_config().use_cache = True
        return Trained(folder, fitted.model.eval(), start, end, own, hashes(folder))

    def loaded(self, past: dict[str, Past]) -> Any:
        """The model as it stands after some stages."""
        return self.method.load(self.base(), past).eval()

    def batch(self, rows: list[Item], generation: bool = False) -> Batch:
        """Rows of any tasks."""
        processor = self.backbone.load_processor(self.path)
        collate = Collator(self.backbone, processor, 2048, generation=generation)
        return collate(rows).to(self.ranks.device)

    def logits(self, model: nn.Module, rows: list[Item], trained: bool = False) -> Tensor:
        """Logits of the answering model; one that was just `trained` may have no name to choose by."""
        batch = self.batch(rows)
        plain = trained and self.method.capabilities.needs_task and find_carrier(model) is None
        tasks = [record.task for record, _ in rows]
        answering = nullcontext(Prompt.of(batch)) if plain else self.method.answering(model, batch, tasks)
        with torch.no_grad(), answering as prompt:
            found: Tensor = model(**prompt.inputs).logits
        return found

    def answers(self, model: Any, rows: list[Item], beams: int = 1, tokens: int = 4) -> list[list[int]]:
        """Generated token ids of each row, without what ends them."""
        batch = self.batch(rows, generation=True)
        tasks = [record.task for record, _ in rows]
        with torch.no_grad(), self.method.answering(model, batch, tasks, beams) as prompt:
            ids = model.generate(**prompt.inputs, max_new_tokens=tokens, do_sample=False, num_beams=beams)
        ended = {model.generation_config.pad_token_id, model.generation_config.eos_token_id}
        tails = ids[:, prompt.skip :].tolist()
        return [[token for token in tail if token not in ended] for tail in tails]


def _all(past: Past) -> Examples:
    return sum((examples(task.name) for task in past.tasks), start=Examples())


def _own_modules(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith(("delo_llava.", "peft.tuners")):
            name = kind.__name__.removesuffix("4bit")  # PEFT has a class of its own for such linears
            counts[name] = counts.get(name, 0) + 1
    return counts


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in `folder`."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@dataclass
class Story:
    """A method's stages over the two tasks, one after the other."""

    bench: Bench
    stages: list[Stage] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)

    def past(self, count: int) -> dict[str, Past]:
        """What the first `count` stages left."""
        pairs = zip(self.stages[:count], self.trained, strict=False)
        return {stage.name: Past(done.folder, stage.tasks) for stage, done in pairs}


@cache
def story(name: str, kind: str = "llava", quant: str = "none", *words: str) -> Story:
    """Train a method's stages; the result is shared by all tests of this process and not to be changed."""
    told, folder = Story(Bench(name, kind, quant, *words)), Path(mkdtemp())
    for stage in told.bench.stages():
        stage = Stage(stage.index, stage.name, stage.tasks, told.past(stage.index), stage.seed)
        told.stages.append(stage)
        told.trained.append(told.bench.train(stage, folder / stage.name))
    return told
