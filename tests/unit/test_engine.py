"""Engines and loop against a plain float64 computation; what DeepSpeed files may not say; dealing."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delo_llava.config import RunConfig, TrainConfig
from delo_llava.engines.build import build_engine
from delo_llava.engines.deepspeed import (
    check_deepspeed_file,
    deepspeed_settings,
    engine_name,
    read_deepspeed_file,
    zero_stage,
)
from delo_llava.engines.module import MethodModule
from delo_llava.engines.optim import cosine_with_warmup
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.single import SingleEngine
from delo_llava.errors import DeloError
from delo_llava.methods.base import Clock, Method
from delo_llava.runs.job import check_plan
from delo_llava.training.loop import StepReport, run_steps
from delo_llava.training.mixture import ahead, deal

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass
class Rows:
    """Stands in for a batch: x is B×2, y is B; rows with y = 0 do not count for the second term."""

    x: Tensor
    y: Tensor
    record_ids: list[str]
    filler: bool = False
    cuts: frozenset[object] = frozenset()

    def to(self, device: object) -> "Rows":
        return self


@dataclass
class Notes:
    """An observer that remembers."""

    reports: list[StepReport] = field(default_factory=list)
    left_out: list[tuple[int, list[str]]] = field(default_factory=list)

    def step(self, report: StepReport) -> None:
        self.reports.append(report)

    def skipped(self, step: int, record_ids: list[str]) -> None:
        self.left_out.append((step, record_ids))

    def save(self, step: int) -> None:
        raise AssertionError("nothing asks to save here")


class Toy(Method):
    """Two loss terms: squared error over all rows, absolute value over the rows with y != 0."""

    begin = save = load = answering = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.seen: list[str] = []

    def weights(self, clock: Clock) -> dict[str, float]:
        return {"answer": 1.0, "extra": 0.5}

    def counts(self, batch: Any) -> dict[str, float]:
        return {"answer": float(len(batch.y)), "extra": float((batch.y != 0).sum())}

    def loss_sums(self, model: nn.Module, batch: Rows) -> dict[str, Tensor]:
        out = model(batch.x).squeeze(1)
        return {"answer": ((out - batch.y) ** 2).sum(), "extra": (out.abs() * (batch.y != 0)).sum()}

    def after_backward(self, model: nn.Module, batch: Any, clock: Clock) -> None:
        self.seen += batch.record_ids


def rows(count: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator).float()
    return Rows(torch.randn(count, 2, generator=generator), y, [f"{seed}.{i}" for i in range(count)])


def pieces(batch: Rows, sizes: list[int]) -> list[Rows]:
    parts = zip(batch.x.split(sizes), batch.y.split(sizes), strict=True)
    return [Rows(x, y, [f"id{i}"] * len(y)) for i, (x, y) in enumerate(parts)]


def config(**train: Any) -> RunConfig:
    return RunConfig(zero="none", train=TrainConfig(global_batch=6, micro_batch=2, lr=0.1, **train))


def trained(
    batches: list[Rows], sizes: list[int], settings: RunConfig, notes: Notes | None = None
) -> tuple[nn.Module, list[StepReport], Toy]:
    torch.manual_seed(0)
    model, toy = nn.Linear(2, 1), Toy()
    module = MethodModule(model, toy, touch_all=True)  # type: ignore[arg-type]
    groups = [{"params": list(model.parameters()), "name": "language", "peak": settings.train.lr, "lr": 0.0}]
    engine = SingleEngine(module, groups, settings, len(sizes))
    notes = notes or Notes()
    shares: Any = [pieces(batch, sizes) for batch in batches]
    run_steps(engine, module, shares, lambda step: Clock(step, len(batches), 1), settings.train, ALONE, notes)
    return model, notes.reports, toy


def reference(batches: list[Rows], settings: RunConfig) -> tuple[nn.Module, list[float], list[float]]:
    """The same training written out in float64, each global batch in one piece."""
    torch.manual_seed(0)
    model, train = nn.Linear(2, 1).double(), settings.train
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
    )
    losses, norms = [], []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = train.lr * cosine_with_warmup(step, len(batches), train.warmup)
        out, y = model(batch.x.double()).squeeze(1), batch.y.double()
        loss = ((out - y) ** 2).mean() + 0.5 * out[y != 0].abs().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, (train.clip or float("inf")) / float(norm))
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    return model, losses, norms


@pytest.mark.parametrize("sizes", [[6], [2, 2, 2], [1, 5], [1] * 6])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_any_accumulation_is_the_mean_over_the_global_batch(sizes: list[int], clip: float) -> None:
    batches, settings = [rows(6, seed) for seed in range(5)], config(clip=clip, weight_decay=0.01, warmup=0.2)
    model, reports, _ = trained(batches, sizes, settings)
    expected, losses, norms = reference(batches, settings)
    assert [r.loss for r in reports] == pytest.approx(losses, abs=1e-6)
    assert [r.grad_norm for r in reports] == pytest.approx(norms, rel=1e-4)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)


def test_reports_tell_terms_rates_and_counts() -> None:
    batch, settings = rows(6, 1), config()
    _, (report, last), toy = trained([batch, batch], [2, 2, 2], settings)
    torch.manual_seed(0)
    out = nn.Linear(2, 1)(batch.x).squeeze(1)
    assert report.terms["answer"] == pytest.approx(float(((out - batch.y) ** 2).mean()), abs=1e-6)
    assert report.terms["extra"] == pytest.approx(float(out[batch.y != 0].abs().mean()), abs=1e-6)
    assert report.loss == pytest.approx(report.terms["answer"] + 0.5 * report.terms["extra"])
    assert (report.lr, last.lr) == (
        {"language": 0.1},
        {"language": pytest.approx(0.1 * cosine_with_warmup(1, 2, 0.03))},
    )
    assert report.answer_tokens == 6
    assert toy.seen == [f"id{i}" for i in (0, 0, 1, 1, 2, 2)] * 2, (
        "every micro-batch is seen once after its backward"
    )


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    good, bad = rows(6, 1), rows(6, 2)
    bad.x[0, 0] = float("nan")
    with pytest.raises(DeloError, match=r"not finite at step 1(.|\n)*id0"):
        trained([good, bad], [3, 3], config())


def test_an_unlabelled_micro_batch_is_an_error() -> None:
    class Empty(Toy):
        def counts(self, batch: Rows) -> dict[str, float]:
            return {"answer": 0.0}

    model = nn.Linear(2, 1)
    module = MethodModule(model, Empty(), touch_all=False)  # type: ignore[arg-type]
    engine = SingleEngine(
        module, [{"params": list(model.parameters()), "name": "language", "peak": 1.0}], config(), 1
    )
    share: Any = [[rows(2, 0)]]
    with pytest.raises(DeloError, match="no trained answer token"):
        run_steps(engine, module, share, lambda step: Clock(step, 1, 1), config().train, ALONE, Notes())


def test_steps_that_are_not_finite_are_left_out_by_policy_up_to_a_limit() -> None:
    good, bad, infinite = rows(6, 1), rows(6, 2), rows(6, 3)
    bad.x[0, 0] = float("nan")
    infinite.y[4] = float("inf")
    notes, settings = Notes(), config(on_nonfinite="skip", max_nonfinite=2)
    model, reports, toy = trained([good, bad, infinite], [3, 3], settings, notes)
    assert notes.left_out == [(1, ["id0"] * 3), (2, ["id1"] * 3)]
    assert [report.step for report in reports] == [0]
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(p.grad is not None for p in model.parameters()), "gradients of a step left out are gone"
    assert toy.seen == ["id0"] * 3 + ["id1"] * 3 + ["id1"] * 3 + ["id0"] * 3, "statistics only of finite ones"
    with pytest.raises(DeloError, match="3 steps of this stage"):
        trained([bad, infinite, bad], [3, 3], settings)


def test_touching_gives_unused_parameters_a_zero_gradient_and_changes_nothing_else() -> None:
    class Half(Toy):
        def loss_sums(self, model: nn.Module, batch: Rows) -> dict[str, Tensor]:
            return {"answer": model.get_submodule("0")(batch.x).sum()}

    batch: Any = rows(2, 0)
    for touch in (False, True):
        model = nn.Sequential(nn.Linear(2, 1), nn.Linear(3, 1))
        module = MethodModule(model, Half(), touch_all=touch)  # type: ignore[arg-type]
        module(batch)["answer"].backward()
        used, unused = model[0].weight.grad, model[1].weight.grad
        assert torch.allclose(used, batch.x.sum(0, keepdim=True))
        assert (unused is None) is not touch
        assert unused is None or (unused.shape == (1, 3) and not unused.any())


# ---- DeepSpeed files ----
@pytest.mark.parametrize(("name", "stage"), [("1", 1), ("2", 2), ("3", 3), ("2_offload", 2)])
def test_the_shipped_files_leave_the_recipe_alone(name: str, stage: int) -> None:
    settings = RunConfig(zero=name, train=TrainConfig(global_batch=32, micro_batch=4, clip=0.7))
    assert zero_stage(settings) == stage
    found = deepspeed_settings(settings, 8, torch.device("cpu"))
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & set(found)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 8)
    assert (found["gradient_clipping"], found["zero_allow_untested_optimizer"]) == (0.7, True)
    offload = found["zero_optimization"].get("offload_optimizer")
    assert offload is None or offload["pin_memory"] is False, "no pinned memory without CUDA"


def given(tmp_path: Path, content: dict[str, Any], **more: Any) -> RunConfig:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return RunConfig(ds_config=path, **more)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_file_that_would_replace_the_recipe_is_refused(tmp_path: Path, section: str) -> None:
    content = {"zero_optimization": {"stage": 2}, section: {"type": "AdamW"}}
    with pytest.raises(DeloError, match=f"section `{section}`"):
        read_deepspeed_file(given(tmp_path, content))
    assert section in read_deepspeed_file(given(tmp_path, content, allow_ds_optimizer=True))


def test_what_the_configuration_decides_is_refused_unless_auto(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    assert (
        deepspeed_settings(given(tmp_path, content), 2, torch.device("cpu"))["train_micro_batch_size_per_gpu"]
        == 16
    )
    with pytest.raises(DeloError, match="gradient_accumulation_steps"):
        read_deepspeed_file(given(tmp_path, {**content, "gradient_accumulation_steps": 4}))


def test_a_file_without_a_stage_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="names no ZeRO stage"):
        read_deepspeed_file(given(tmp_path, {}))
    with pytest.raises(DeloError, match="cannot be read"):
        read_deepspeed_file(RunConfig(ds_config=tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], "cannot be read"),
        ({"zero_optimization": 3}, "cannot be read"),
        ({"zero_optimization": {"stage": "two"}}, "no ZeRO stage 'two'"),
        ({"zero_optimization": {"stage": True}}, "no ZeRO stage True"),
        ({"zero_optimization": {"stage": 0}}, "no ZeRO stage 0"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "much"}},
            "optimization.reduce_bucket_size`",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimiser": {}}}, "optimization.offload_optimiser`"),
    ],
)
def test_what_deepspeed_would_refuse_later_is_told_before_the_run(
    tmp_path: Path, content: Any, told: str
) -> None:
    with pytest.raises(DeloError, match=told) as error:
        check_deepspeed_file(given(tmp_path, content, device="cpu"))
    assert str(tmp_path / "ds.json") in str(error.value.given)
    check_deepspeed_file(given(tmp_path, {"zero_optimization": {"stage": 2}}, device="cpu"))


def test_an_engine_goes_by_the_stage_of_the_file_that_was_given(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 3}}
    assert engine_name(given(tmp_path, content)) == "3"
    assert engine_name(given(tmp_path, content, zero="none")) == "none"
    assert engine_name(RunConfig(zero="2_offload")) == "2_offload"


def test_the_one_process_engine_is_chosen_by_name() -> None:
    model = nn.Linear(2, 1)
    module = MethodModule(model, Toy(), touch_all=False)  # type: ignore[arg-type]
    groups = [{"params": list(model.parameters()), "name": "language", "peak": 1.0}]
    assert isinstance(build_engine(module, groups, config(), ALONE, 3), SingleEngine)


# ---- ranks and batches ----
def test_plans_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check_plan(RunConfig(train=TrainConfig(global_batch=32, micro_batch=4))) == 2
    with pytest.raises(DeloError, match="one-process engine"):
        check_plan(RunConfig(zero="none"))
    with pytest.raises(DeloError, match="global batch 30"):
        check_plan(RunConfig(train=TrainConfig(global_batch=30, micro_batch=4)))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_dealing_gives_every_rank_an_image_or_none(world: int, micro: int, passes: int) -> None:
    count = world * micro * passes
    for images in range(count + 1):
        step = list(range(100, 100 + count))
        has = {index: (index * 7) % count < images for index in step}
        shares = deal(step, [has[i] for i in step], world, micro)
        assert sorted(i for share in shares for part in share for i in part) == step
        assert {len(part) for share in shares for part in share} == {micro}
        assert {len(share) for share in shares} == {passes}
        agree = all(
            len({any(has[i] for i in part) for part in parts}) == 1 for parts in zip(*shares, strict=True)
        )
        total = sum(has.values())
        assert agree is (total == 0 or total >= world)


def test_work_done_ahead_keeps_its_order_and_its_errors() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        if number == 3:
            raise DeloError("record 3 is broken")
        return number * 10

    results = ahead(iter(range(5)), make)
    assert [next(results) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(DeloError, match="record 3"):
        next(results)
    assert made == [0, 1, 2, 3]
