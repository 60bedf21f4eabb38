"""A stage in memory: what a federated client calls, what a run's stage calls, and stages that train
nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import training_support as support
from safetensors.torch import load_file
from torch import Tensor, nn

from delo_llava.backbones.base import find_backbone
from delo_llava.config import RunConfig, load_config
from delo_llava.data.examples import Examples, dropped_view, shown
from delo_llava.data.missing import MissingSpec
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.data.sampler import mixed_batches
from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Part, Passes, Prompt, Reduce, Stage
from delo_llava.registry import load_plugin
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence
from delo_llava.runs.stage import stage_seed
from delo_llava.training.fit import Kit, Silent, fit, seed_everything
from delo_llava.training.loop import Ledger
from delo_llava.training.mixture import StageBatches, StagePasses

ALONE = Ranks(0, 1, torch.device("cpu"))


class Place:
    """The tiny sequence and how to build a stage of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, support.write_sequence(folder, tasks=1)
        self.task = load_sequence(str(self.recipe), folder).tasks[0]

    def config(self, *more: str) -> RunConfig:
        words = support.words(self.recipe, tiny_models.session("llava"), self.folder / "run", *more)
        return load_config(None, words)

    def build(self, config: RunConfig, seed: int, method: Method | None = None) -> tuple[Any, Method, Kit]:
        backbone, path = find_backbone(config.model)
        kind: Any = load_plugin("method", config.method)
        method = method or kind(kind.Config(**config.methods[config.method]), config, backbone)
        seed_everything(seed)
        base = backbone.load(path, quant=config.quant, device="cpu")
        base.config.get_text_config().use_cache = False
        model = method.begin(base, Stage(0, "task0", (self.task,), seed=seed)).train()
        return model, method, Kit(backbone, backbone.load_processor(path))

    def examples(self, config: RunConfig) -> Examples:
        return Examples.of(read_records(self.task, "train"), config.missing)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("fit"))


def test_a_run_s_stage_is_what_fit_gives(place: Place) -> None:
    """The same bits with and without a folder; nothing is written by `fit`."""
    config = place.config("--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8")
    seed = stage_seed(config.seed, 0)
    model, method, kit = place.build(config, seed)
    silent = Silent()
    before = sorted(place.folder.rglob("*"))
    fitted = fit(
        model,
        method,
        (Part(place.examples(config)),),
        config,
        ALONE,
        kit,
        seed=seed,
        observe=lambda _: silent,
    )
    assert sorted(place.folder.rglob("*")) == before
    run_sequence(make_job(config), None)
    adapter = load_file(place.folder / "run/adapters/task0/adapter_model.safetensors")
    names = {name.replace(".task0", ""): tensor for name, tensor in fitted.tensors.items()}
    assert names.keys() <= adapter.keys()
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in names.items())
    assert (fitted.examples, fitted.steps, fitted.trainable) == (
        16,
        4,
        sum(t.numel() for t in names.values()),
    )
    assert [report.loss for report in silent.reports] == [
        e["loss"] for e in support.metrics(place.folder / "run")
    ]
    keys = load_file(place.folder / "run/adapters/task0/task_keys.safetensors")
    assert keys["count"].sum() > 0


def test_any_subset_of_records_can_be_trained_on(place: Place) -> None:
    config = place.config("--train.global_batch=2", "--missing.ratio=0")
    model, method, kit = place.build(config, 3)
    some = place.examples(config).select([1, 5, 6])
    assert [some[i][0].id for i in range(3)] == ["train-1", "train-5", "train-6"]
    fitted = fit(model, method, (Part(some),), config, ALONE, kit, seed=3)
    assert (fitted.examples, fitted.steps) == (3, 3), "two epochs of three records, in batches of two"
    assert fitted.state == {} and fitted.ledger.last


class Counting(Method):
    """Trains nothing: counts its examples before and after."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[int] = []

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        return base.requires_grad_(False)

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        self.seen.append(sum(len(batch) for batch in passes.all()))
        self.seen.append(sum(len(batch) for batch in passes.complete(5)))

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        sizes = [len(batch) for batch in passes.drawn(3, size=1)]
        self.seen += [sum(sizes), max(sizes)]

    def loss_sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        raise AssertionError("there is nothing to train")

    def save(self, model: nn.Module, stage: Stage, folder: Path) -> None: ...
    def load(self, base: nn.Module, past: Any) -> nn.Module:
        return base

    def answering(self, model: nn.Module, batch: Any, tasks: Any, beams: int = 1) -> Any:
        yield Prompt.of(batch)


def test_a_method_may_train_nothing(place: Place) -> None:
    config = place.config()
    method = Counting(None, config, find_backbone(config.model)[0])
    model, _, kit = place.build(config, 0, method)
    fitted = fit(model, method, (Part(place.examples(config)),), config, ALONE, kit, seed=0)
    assert (fitted.steps, fitted.trainable, fitted.tensors) == (0, 0, {})
    assert method.seen == [16, 5, 3, 1]


def test_some_records_are_drawn_evenly_and_alike_for_any_number_of_ranks(place: Place) -> None:
    config = place.config("--missing.ratio=0.5", "--missing.kind=image")
    examples, whole = place.examples(config), [f"train-{i}" for i in range(16)]
    kit = Kit(find_backbone(config.model)[0], find_backbone(config.model)[0].load_processor(config.model))

    def names(count: int, seed: int, world: int = 1, complete: bool = False) -> list[str]:
        found = []
        for rank in range(world):
            ranks = Ranks(rank, world, torch.device("cpu"))
            passes = StagePasses(examples, config, ranks, lambda: kit.collator(config), Ledger(), seed)
            batches = passes.complete(count) if complete else passes.drawn(count, size=3)
            found += [name for batch in batches for name in batch.record_ids]
        return sorted(found, key=whole.index)

    draws = [names(4, seed) for seed in range(40)]
    assert all(len(set(draw)) == 4 for draw in draws)
    assert {name for draw in draws for name in draw} == set(whole), "every record may come"
    assert names(5, 7, world=2) == names(5, 7) == names(5, 7)
    assert names(16, 0) == names(99, 3) == whole
    shown_whole = [whole[i] for i in np.flatnonzero(examples.presence.all(1))]
    assert len(shown_whole) == 8 and names(99, 0, complete=True) == shown_whole
    assert set(names(3, 1, complete=True)) < set(shown_whole)


def test_shares_of_a_mixture_are_kept_in_every_batch(place: Place) -> None:
    config = place.config("--train.epochs=1", "--missing.ratio=0")
    whole = place.examples(config)
    own, other = whole.select(range(12)), whole.select(range(12, 16))
    batches = StageBatches(config, (Part(own, 0.75), Part(other, 0.25)), 5)
    assert len(batches.examples) == 16 and batches.epoch_steps == 2
    for step in batches.steps:
        assert sum(index < 12 for index in step) == 6 and len(step) == 8
    assert sorted(i for step in batches.steps for i in step if i < 12) == list(range(12))
    for shares in ((0.75, None), (0.5, 0.4), (0.99, 0.01)):
        with pytest.raises(DeloError, match="mixture"):
            StageBatches(config, (Part(own, shares[0]), Part(other, shares[1])), 5)


def test_parts_of_a_mixture_come_in_orders_of_their_own() -> None:
    steps = mixed_batches([6, 6], [3, 3], 4, [0] * 12, seed=1)
    assert steps == mixed_batches([6, 6], [3, 3], 4, [0] * 12, seed=1)
    first, second = ([i for step in steps for i in step if low <= i < low + 6] for low in (0, 6))
    assert sorted(first) == sorted([*range(6), *range(6)]) and [i - 6 for i in second] != first
    with pytest.raises(DeloError, match="no records"):
        mixed_batches([6, 0], [3, 3], 4, [0] * 6, seed=1)


def test_examples_are_joined_and_chosen_with_their_presence(place: Place) -> None:
    records = read_records(place.task, "train")
    one = Examples.of(records, MissingSpec(ratio=0.5, kind="image", seed=2))
    two = Examples(((list(records)[:2], np.array([[True, False], [False, True]])),))
    joined = one + two
    assert len(joined) == 18 and joined[17][1] == (False, True)
    assert joined.characters.shape == (18, 2) and joined.presence.shape == (18, 2)
    assert (joined.characters[16] == joined.characters[0]).all()
    chosen = joined.select([0, 3, 16])
    assert [item[0].id for item in map(chosen.__getitem__, range(3))] == ["train-0", "train-3", "train-0"]
    assert chosen[2][1] == (True, False)
    with pytest.raises(IndexError):
        joined[18]
    assert len(Examples()) == 0 and Examples().presence.shape == (0, 2)


def test_a_dropped_view_is_of_complete_rows(place: Place) -> None:
    items = [place.examples(place.config("--missing.ratio=0.5"))[i] for i in range(16)]
    view = dropped_view(items, 1)
    assert view.rows == tuple(i for i, item in enumerate(items) if all(shown(item)))
    assert all(sum(presence) == 1 for _, presence in view.items)
