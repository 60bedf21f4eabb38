"""Every method trained, resumed, saved, loaded, asked and merged where tensors do not lie on the CPU: a line
that would die on the first GPU dies here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from contract_support import CORE, Bench, Story, items
from pretend_device import PRETEND, Elsewhere, moved, pretend_device
from torch import Tensor

from delo_eval.answers.question import Question
from delo_eval.harness.generate import Answerer
from delo_llava.backbones.base import Backbone
from delo_llava.engines.ranks import Ranks
from delo_llava.features.queries import Queries
from delo_llava.features.ridge import RidgeStatistics
from delo_llava.features.task_keys import TaskKeyMemory
from delo_llava.methods.base import Stage
from delo_llava.registry import plugin_names
from delo_llava.runs.export import merge
from delo_llava.runs.step_state import StepCheckpoints
from delo_llava.runs.steps import StepStore
from delo_llava.training.fit import Running, Silent

#: Options with code of their own, by method; an encoder is the tiny CLIP.
VARIANTS: dict[str, dict[str, Any]] = {
    "cram": {"transductive": True},
    "dac": {"router": "frozen_random"},
    "delo": {
        "scope": "all", "pools": "shared", "gate": "softmax", "conditional": "factor",
        "cross_modal": "linear", "matcher": "cosine",
    },
    "disco": {"encoder": "", "views": ["image", "text"]},
    "ewc": {"accumulate": "online"},
    "hide": {"encoder": "", "cross_terms": True},
    "l2p": {"encoder": "", "transductive": True},
    "olora": {"norm": "squared"},
    "prism": {"bases": "two", "total": 3},
    "smolora": {"gate": "none"},
}  # fmt: skip
#: Mixtures of experts count with an operator that only CUDA has for integers, wherever that is not the CPU.
UNPRETENDED = ("qwen3_vl_moe",)
CASES = [
    *(
        pytest.param(name, {}, "llava", id=name, marks=() if name in CORE else pytest.mark.long)
        for name in plugin_names("method")
    ),
    *(
        pytest.param(name, options, "llava", id=f"{name}-varied", marks=pytest.mark.long)
        for name, options in VARIANTS.items()
    ),
    *(
        pytest.param("delo", {}, kind, id=f"delo-{kind}", marks=pytest.mark.long)
        for kind in plugin_names("backbone") if kind not in ("llava", *UNPRETENDED)
    ),
]  # fmt: skip
#: Two steps of one micro-batch, and a checkpoint between them.
SHORT = ("--train.epochs=1", "--train.micro_batch=4", "--train.save_every=1")


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pretend device, to which bases can be loaded."""
    load: Callable[..., Any] = Backbone.load

    def load_there(*args: Any, device: str, **how: Any) -> Any:
        there = device == str(PRETEND)
        model = load(*args, device="cpu" if there else device, **how)
        return moved(model) if there else model

    monkeypatch.setattr(Backbone, "load", load_there)
    with pretend_device():
        yield


class There(Bench):
    """A method and its base on the pretend device."""

    ranks = Ranks(0, 1, PRETEND)


class Keeper(Silent):
    """Saves the checkpoints of a stage."""

    def __init__(self, running: Running, checkpoints: StepCheckpoints) -> None:
        super().__init__()
        self.running, self.checkpoints = running, checkpoints

    def save(self, step: int) -> None:
        """Before `step`."""
        self.checkpoints.save(step, self.running.engine, self.running.ledger)


def trained(bench: Bench, folder: Path) -> Story:
    """All stages of a method; each is also left after its first step and gone on with, which must change
    nothing.
    """
    told = Story(bench)
    for stage in bench.stages():
        stage = Stage(stage.index, stage.name, stage.tasks, told.past(stage.index), stage.seed)
        steps = StepStore(folder / f"{stage.name}_steps", keep=2)
        saving = StepCheckpoints(steps, bench.ranks, bench.method, {"stage": stage.index})
        done = bench.train(stage, folder / stage.name, observe=lambda running, to=saving: Keeper(running, to))
        if stage.index:
            again = bench.train(stage, folder / f"{stage.name}_again", resumed=saving.find())
            assert again.hashes == done.hashes
        told.stages.append(stage)
        told.trained.append(done)
    return told


def rows_of(bench: Bench) -> list[Any]:
    """Rows that the method may answer together, with every pattern of what is missing."""
    if bench.method.capabilities.needs_task:
        return items("task0")
    return [*items("task0")[:2], *items("task1")[1:3]]


def asked(bench: Bench, model: Any, rows: list[Any], tasks: tuple[str, ...]) -> list[str]:
    """What the harness gets as answers of two tokens, with a choice of the task where there is one."""
    answerer = Answerer(
        model=model, method=bench.method, collate=bench.kit.collator(bench.config, generation=True),
        tokenizer=bench.kit.processor.tokenizer, device=bench.ranks.device, trained=tasks,
    )  # fmt: skip
    return [answer.prediction for answer in answerer.answer([Question(*row) for row in rows], 2)]


@pytest.mark.parametrize(("name", "options", "kind"), CASES)
def test_a_method_lives_off_the_cpu(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """What is trained there, answers there as its files do on the CPU."""
    if "encoder" in options:
        options = options | {"encoder": str(tiny_models.session_clip())}
    bench, here = There(name, kind, "none", *SHORT, **options), Bench(name, kind, "none", **options)
    told = trained(bench, tmp_path)
    past = told.past(len(told.stages))
    model, plain = bench.loaded(past), here.loaded(past)
    lost = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device != PRETEND]
    assert not lost, "these did not follow their model"
    rows, tasks = rows_of(bench), tuple(task.name for stage in told.stages for task in stage.tasks)
    logits = bench.logits(model, rows)
    assert torch.allclose(logits.cpu(), here.logits(plain, rows), atol=1e-4)
    assert asked(bench, model, rows, tasks) == asked(here, plain, rows, tasks)
    bench.method.routing_use(model)
    if bench.method.capabilities.mergeable and past:
        merged = merge(bench.method, bench.path, past, torch.float32, "trained", str(PRETEND)).model
        with torch.no_grad():
            found = merged(**bench.batch(rows).inputs).logits
        assert torch.allclose(found.cpu(), logits.cpu(), atol=1e-4)


# ---- what decides ----
def views(device: torch.device) -> tuple[Queries, Tensor]:
    """Queries of six samples and what is there of them."""
    drawn = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    presence = torch.tensor([[True, True], [True, False], [False, True]] * 2)
    return Queries(*(view.to(device) for view in drawn)), presence.to(device)


@pytest.mark.parametrize("flags", [torch.device("cpu"), PRETEND])
def test_ridge_statistics_of_queries_elsewhere(flags: torch.device) -> None:
    """Where the queries lie changes no bit; the flags may have stayed on the CPU."""
    here, there = RidgeStatistics.empty(4), RidgeStatistics.empty(4)
    here.observe(*views(torch.device("cpu")))
    queries, presence = views(PRETEND)
    there.observe(queries, presence.to(flags))
    for name, tensor in here.tensors().items():
        assert torch.equal(tensor, there.tensors()[name])


@pytest.mark.parametrize("matcher", ["cosine", "lda"])
def test_a_choice_among_tasks_from_queries_elsewhere(matcher: Any) -> None:
    choices = []
    for device in (torch.device("cpu"), PRETEND):
        memory, (queries, presence) = TaskKeyMemory(4), views(device)
        for task, sign in (("a", 1), ("b", -1)):
            memory.observe(task, Queries(*(sign * view for view in queries)), presence)
            memory.settle(task)
        choices.append(memory.choose(queries, presence, ["a", "b"], matcher))
    for one, other in zip(*choices, strict=True):
        assert other.device == PRETEND and torch.equal(one, other.cpu())


# ---- the pretence ----
def pair() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix and an index, here and elsewhere."""
    matrix, index = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])
    return matrix, index, matrix.to(PRETEND), index.to(PRETEND)


def test_the_pretend_device_refuses_what_cuda_refuses() -> None:
    """First of all the line on which every DeLo run died on the first GPU."""
    here, index, there, index_there = pair()
    module = moved(torch.nn.Linear(3, 2))
    mixed: list[Callable[[], object]] = [
        lambda: there.index_select(0, index),
        lambda: here.index_select(0, index_there),
        lambda: here[index_there],
        lambda: there.gather(1, index[:, None]),
        lambda: torch.where(here > 1, there, there),
        lambda: there.masked_fill(here > 1, 0.0),
        lambda: torch.cat([here, there]),
        lambda: torch.stack([there, here]),
        lambda: there @ here.T,
        lambda: here.add_(there),
        lambda: here.add_(there.sum()),
        lambda: there + here,
        lambda: torch.equal(here, there),
        lambda: torch.nn.functional.embedding(index, there),
        lambda: there.index_add_(0, index_there, here),
        lambda: there.index_put_((index,), here),
        lambda: module(here),
        lambda: torch.randn(2, device=PRETEND, generator=torch.Generator()),
        lambda: setattr(module.weight, "data", here[:, :3]),
    ]
    for meeting in mixed:
        with pytest.raises(RuntimeError, match="same device|generator|data of a tensor"):
            meeting()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_the_pretend_device_allows_what_cuda_allows() -> None:
    here, index, there, index_there = pair()
    number = torch.tensor(2.0)
    flags = here > 1
    same: list[tuple[Tensor, Tensor]] = [
        (there[index], here[index]),
        (there[flags], here[flags]),
        (there * number, here * number),
        (torch.where(there > 1, there, number), torch.where(here > 1, here, number)),
        (there.clone().index_put_((index,), number), here.clone().index_put_((index,), number)),
        (there.clone().copy_(here + 1), here + 1),
        (there[0] @ there.T, here[0] @ here.T),
        (there.gather(1, index_there[:, None]), here.gather(1, index[:, None])),
        (torch.tensor([1.0, 2.0], device=PRETEND), torch.tensor([1.0, 2.0])),
        (torch.tensor([there[0, 1], 4], device=PRETEND), torch.tensor([1.0, 4.0])),
        (torch.zeros_like(there).new_ones(2), torch.ones(2)),
    ]
    for found, expected in same:
        assert isinstance(found, Elsewhere) and found.device == PRETEND
        assert torch.equal(found.cpu(), expected)
    assert torch.zeros(2).device.type == "cpu" and there.tolist() == here.tolist()


def test_gradients_flow_there_as_here() -> None:
    here = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    here(x).square().sum().backward()
    expected = [parameter.grad for parameter in here.parameters()]
    here.zero_grad()
    there = moved(here)
    there(x.to(PRETEND)).square().sum().backward()
    for parameter, gradient in zip(there.parameters(), expected, strict=True):
        assert parameter.grad is not None and parameter.grad.device == PRETEND and gradient is not None
        assert torch.equal(parameter.grad.cpu(), gradient)
