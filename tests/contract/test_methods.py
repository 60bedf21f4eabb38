"""What every method must do, on every model family; a new method is covered as soon as its file exists."""

import hashlib
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from method_support import START, Given, alone
from training_support import write_sequence

from delo_llava.backbones.base import find_backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch, Collator
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.methods.base import Method, Past, Prompt, Stage
from delo_llava.registry import load_plugin, plugin_names

METHODS = plugin_names("method")
SMALL = {"delo": {"pool_size": 4, "rank": 2, "latent": 4, "ridge_samples": 8}}
PRESENCE = [(True, True), (True, False), (False, True), (True, True)]
TASKS = ("task0", "task1")


@cache
def records(task: str) -> list[Any]:
    """Four records of a task of the tiny sequence."""
    folder = tiny_models.session("llava").parent / "sequence"
    sequence = load_sequence(str(write_sequence(folder, records=4)), folder)
    return list(read_records(next(t for t in sequence.tasks if t.name == task), "train"))


class Bench:
    """One method on one tiny family."""

    def __init__(self, name: str, kind: str = "llava", **options: Any) -> None:
        section = {**SMALL.get(name, {}), **options}
        self.run = RunConfig(method=name, methods={"delo": SMALL["delo"], name: section})
        self.backbone, self.path = find_backbone(tiny_models.session(kind))
        chosen: Any = load_plugin("method", name)
        self.method: Method = chosen(chosen.Config(**section), self.run, self.backbone)

    def base(self) -> Any:
        """A fresh NF4 base."""
        return self.backbone.load(self.path, quant="nf4", device="cpu")

    def batch(self, task: str, generation: bool = False, rows: slice = slice(None)) -> Batch:
        """The records of `task` with mixed presence."""
        processor = self.backbone.load_processor(self.path)
        collate = Collator(self.backbone, processor, 2048, generation=generation)
        views = None if generation else lambda items: self.method.views(items, START)
        return collate(list(zip(records(task), PRESENCE, strict=True))[rows], views)

    def train(self, stage: Stage, folder: Path, steps: int = 3) -> Any:
        """A few steps of AdamW, then the stage's files in `folder`; returns the trained model."""
        torch.manual_seed(stage.index)
        model = self.method.begin(self.base(), stage).train()
        batch = self.batch(stage.name)
        self.method.prepare(model, Given([batch]), alone)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        counts, weights = self.method.counts(batch), self.method.weights(START)
        for _ in range(steps):
            sums = self.method.loss_sums(model, batch)
            assert set(sums) == set(counts) == set(weights)
            sum(weights[k] * sums[k] / max(counts[k], 1) for k in sums).backward()
            self.method.after_backward(model, batch, START)
            optimizer.step()
            optimizer.zero_grad()
        self.method.finish(model, Given([batch]), alone)
        folder.mkdir()
        self.method.save(model, stage, folder)
        return model.eval()

    def logits(self, model: Any, task: str, loaded: bool = True) -> torch.Tensor:
        """Logits of the task's batch when answering as the task; a model just trained has only one."""
        batch = self.batch(task)
        needs_no_choice = not loaded and self.method.capabilities.needs_task
        plain = nullcontext(Prompt.of(batch))
        answering = plain if needs_no_choice else self.method.answering(model, batch, [task] * 4)
        with torch.no_grad(), answering as prompt:
            return model(**prompt.inputs).logits


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in `folder`."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", METHODS)
def test_two_tasks_are_trained_saved_and_answered(name: str, tmp_path: Path) -> None:
    """A reload gives the same logits, and isolated tasks stay as they were."""
    bench = Bench(name)
    first, second = tmp_path / "task0", tmp_path / "task1"
    trained = bench.train(Stage(0, "task0"), first)
    before, inside = hashes(first), bench.logits(trained, "task0", loaded=False)
    assert any(f.endswith(".safetensors") for f in before) and not any(
        f.endswith((".bin", ".pt")) for f in before
    )
    alone = bench.logits(_loaded(bench, {"task0": first}), "task0")
    assert torch.equal(inside, alone)

    bench.train(Stage(1, "task1", past={"task0": Past(first)}), second)
    assert hashes(first) == before
    both = bench.logits(_loaded(bench, {"task0": first, "task1": second}), "task0")
    assert torch.equal(both, alone) == bench.method.capabilities.isolated


def _loaded(bench: Bench, folders: dict[str, Path]) -> Any:
    return bench.method.load(bench.base(), {name: Past(folder) for name, folder in folders.items()})


@pytest.mark.parametrize("name", METHODS)
def test_only_the_method_s_own_parameters_train(name: str) -> None:
    bench = Bench(name)
    base = bench.base()
    frozen = {n: p.clone() for n, p in base.named_parameters()}
    model = bench.method.begin(base, Stage(0, "task0"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and not any(
        ".base_layer." in n or n.startswith("base_model.model.lm_head") for n in trainable
    )
    left = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p
        for n, p in model.named_parameters()
        if n not in trainable
    }
    for known, value in frozen.items():
        assert torch.equal(left[known], value), known


@pytest.mark.parametrize("name", METHODS)
def test_the_bare_base_answers_before_any_training(name: str) -> None:
    bench = Bench(name)
    model = bench.method.load(bench.base(), {})
    batch = bench.batch("task0", generation=True)
    with torch.no_grad(), bench.method.answering(model, batch, None) as prompt:
        out = model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[0] == 4


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_answered_alike_alone_and_in_a_batch(name: str, kind: str, tmp_path: Path) -> None:
    bench = Bench(name, kind)
    bench.train(Stage(0, "task0"), tmp_path / "task0")
    model = _loaded(bench, {"task0": tmp_path / "task0"})
    whole = _answers(bench, model, slice(None))
    for row in range(4):
        assert _answers(bench, model, slice(row, row + 1)) == whole[row : row + 1]


def _answers(bench: Bench, model: Any, rows: slice) -> list[list[int]]:
    batch = bench.batch("task0", generation=True, rows=rows)
    tasks = ["task0"] * len(batch.record_ids)
    with torch.no_grad(), bench.method.answering(model, batch, tasks) as prompt:
        ids = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)
    ended = {model.generation_config.pad_token_id, model.generation_config.eos_token_id}
    tails = ids[:, prompt.skip :].tolist()
    return [[token for token in tail if token not in ended] for tail in tails]


@pytest.mark.parametrize("name", [n for n in METHODS if load_plugin("method", n).capabilities.chooses_task])  # type: ignore[attr-defined]
@pytest.mark.parametrize("views", [None, ("image", "text")])
def test_a_choice_is_per_sample_and_among_trained_tasks(name: str, views: Any, tmp_path: Path) -> None:
    bench = Bench(name)
    folders = {}
    for index, task in enumerate(TASKS):
        bench.train(
            Stage(index, task, past={name: Past(folder) for name, folder in folders.items()}), tmp_path / task
        )
        folders[task] = tmp_path / task
        model = _loaded(bench, folders)
        choice = bench.method.choose(model, bench.batch("task0", generation=True), views)
        assert choice is not None and choice.tasks == tuple(folders)
        assert choice.index.shape == (4,) and choice.scores.shape == (4, len(folders))
        for row in range(4):
            single = bench.method.choose(
                model, bench.batch("task0", generation=True, rows=slice(row, row + 1)), views
            )
            assert single is not None and torch.allclose(single.scores[0], choice.scores[row], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"align": 0.5}, {"consistency": 0.5}, {"cross_modal": "linear", "align": 0.1, "consistency": 0.1}],
)
def test_delo_s_auxiliary_losses_train(options: dict[str, Any], tmp_path: Path) -> None:
    """The terms are counted, weighted and differentiable through the whole method; their equations have their
    own tests.
    """
    bench = Bench("delo", **options)
    bench.train(Stage(0, "task0"), tmp_path / "task0")
    batch = bench.batch("task0")
    model = bench.method.begin(bench.base(), Stage(0, "task0")).train()
    sums = bench.method.loss_sums(model, batch)
    for term in set(options) & {"align", "consistency"}:
        assert (
            sums[term].requires_grad and torch.isfinite(sums[term]) and bench.method.counts(batch)[term] > 0
        )
        assert bench.method.weights(START)[term] == options[term]


def test_keys_count_each_sample_once_and_never_a_dropped_view(tmp_path: Path) -> None:
    """Trap T6: a consistency forward must not enter the keys; every micro-batch enters exactly once."""
    bench = Bench("delo", consistency=1.0)
    bench.train(Stage(0, "task0"), tmp_path / "task0", steps=3)
    keys: Any = bench.method
    assert keys._keys.tasks["task0"].count.tolist() == [3 * 3, 3 * 3, 3 * 4]


def test_the_baselines_match_delo_s_trainable_parameters() -> None:
    def trainable(name: str) -> int:
        model = Bench(name).method.begin(Bench(name).base(), Stage(0, "task0"))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    bench = Bench("individual", rank=1)
    per_rank = sum(
        p.numel() for p in bench.method.begin(bench.base(), Stage(0, "t")).parameters() if p.requires_grad
    )
    for name in ("lora", "individual"):
        assert abs(trainable(name) - trainable("delo")) <= per_rank / 2 + 1
