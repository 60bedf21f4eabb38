"""Groups, the schedule and the guards, against independent computations."""

import math

import pytest
import torch
from torch import nn

from delo_llava.config import TrainConfig
from delo_llava.engines.optim import build_optimizer, cosine_with_warmup, rates, set_rates
from delo_llava.errors import DeloError
from delo_llava.methods._groups import LANGUAGE, PROJECTOR, parameter_groups
from delo_llava.training.guards import (
    OutOfMemory,
    fingerprint,
    frozen_parameters,
    judge_bad_images,
    judge_nonfinite,
    memory_told,
    require_trained_tokens,
    require_unchanged,
    smaller_micro_batch,
)
from delo_llava.training.logging import Eta, MetricsLog, clock, matrix_row, matrix_summary

PATTERN = r"model\.multi_modal_projector\.linear_[12]"


class Nest(nn.Module):
    """Named like a wrapped LLaVA with adapters."""

    def __init__(self) -> None:
        super().__init__()
        names = (
            "base_model.model.model.multi_modal_projector.linear_1.lora_A.default",
            "base_model.model.model.layers.0.q.lora_A.default",
        )
        for name in names:
            self._put(name)

    def _put(self, dotted: str) -> None:
        *path, last = dotted.split(".")
        here: nn.Module = self
        for part in path:
            if part not in dict(here.named_children()):
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        here.add_module(last, nn.Linear(2, 2, bias=False))


def test_projector_and_language_parameters_are_apart() -> None:
    train = TrainConfig(lr=1e-3, projector_lr=1e-4, weight_decay=0.1)
    model = Nest()
    language, projector = parameter_groups(model, PATTERN, train)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in projector["params"]] == [
        next(n for n in names.values() if "projector" in n)
    ]
    assert (language["name"], language["peak"]) == (LANGUAGE, 1e-3)
    assert (projector["name"], projector["peak"], projector["weight_decay"]) == (PROJECTOR, 1e-4, 0.1)
    optimizer = build_optimizer([language, projector], train)
    assert set_rates(optimizer, 0.5) == {LANGUAGE: 5e-4, PROJECTOR: 5e-5} == rates(optimizer)


def test_without_a_rate_of_its_own_the_projector_has_the_other() -> None:
    groups = parameter_groups(Nest(), PATTERN, TrainConfig(lr=1e-3))
    assert {group["peak"] for group in groups} == {1e-3}


def test_a_model_with_nothing_to_train_has_no_groups() -> None:
    assert parameter_groups(Nest().requires_grad_(False), PATTERN, TrainConfig()) == []


def test_the_schedule_is_linear_then_cosine() -> None:
    steps, warmup = 100, 0.1
    factors = [cosine_with_warmup(step, steps, warmup) for step in range(steps)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])
    assert 0 < factors[-1] < 1e-3
    assert cosine_with_warmup(0, 1, 0.03) == 1.0, "a stage of one step learns at the full rate"
    assert cosine_with_warmup(0, 3, 0.0) == 1.0


def test_batches_without_labels_are_named() -> None:
    require_trained_tokens({"answer": 1.0}, ["a"])
    with pytest.raises(DeloError, match=r"r0, r1, .* and 2 more"):
        require_trained_tokens({"answer": 0.0}, [f"r{i}" for i in range(10)])


def test_a_step_that_is_not_finite_is_judged_by_policy() -> None:
    stop, skip = TrainConfig(), TrainConfig(on_nonfinite="skip", max_nonfinite=2)
    with pytest.raises(DeloError, match="step 3") as caught:
        judge_nonfinite(stop, 3, ["a", "b"], 1)
    assert "a, b" in str(caught.value)
    judge_nonfinite(skip, 3, ["a"], 2)
    with pytest.raises(DeloError, match="3 steps of this stage"):
        judge_nonfinite(skip, 3, ["a"], 3)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("not enough memory: you …")],
)
def test_full_memory_is_told_with_what_helps(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"used .* GiB of .*; planned 2.0 GiB; train.micro_batch=16") as told,
        memory_told(TrainConfig(), torch.device("cpu"), lambda: "planned 2.0 GiB"),
    ):
        raise error
    assert "--train.micro_batch=8" in str(told.value)
    with pytest.raises(RuntimeError, match="^other$"), memory_told(TrainConfig(), torch.device("cpu"), str):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("batch", "micro", "world", "smaller"), [(32, 16, 2, 8), (30, 15, 1, 6), (32, 1, 1, None), (6, 3, 2, 1)]
)
def test_a_smaller_micro_batch_divides_the_share(
    batch: int, micro: int, world: int, smaller: int | None
) -> None:
    assert smaller_micro_batch(TrainConfig(global_batch=batch, micro_batch=micro), world) == smaller


def test_too_many_bad_images_are_named() -> None:
    judge_bad_images({"t/a": "torn", "t/b": "torn"}, 2)
    with pytest.raises(DeloError, match="3 records have images(.|\n)*t/a: torn"):
        judge_bad_images({f"t/{name}": "torn" for name in "abc"}, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_fingerprint_sees_one_bit_of_any_dtype(dtype: torch.dtype) -> None:
    tensor = torch.arange(7).to(dtype)
    before = fingerprint([("w", tensor)])
    assert fingerprint([("w", tensor.clone())]) == before
    assert fingerprint([("v", tensor)]) != before
    tensor.view(torch.uint8)[-1] ^= 1
    after = fingerprint([("w", tensor)])
    with pytest.raises(DeloError, match="Frozen weights changed"):
        require_unchanged(before, after)


def test_only_frozen_parameters_are_watched() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [name for name, _ in frozen_parameters(model)] == ["bias"]


def test_metrics_of_an_interrupted_stage_are_dropped(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "metrics.jsonl"
    first = '{"stage": 0, "step": 7}\n{"stage": 1, "step": 0}\n'
    path.write_text(first + '{"stage": 1, "step": 1}\n{"stage": 1, "st')
    log = MetricsLog(path, stage=1, step=1)
    log.write({"stage": 1, "task": "b", "step": 1})
    log.close()
    assert path.read_text() == first + '{"stage": 1, "task": "b", "step": 1}\n'


def test_the_eta_counts_steps_and_evaluations_apart() -> None:
    eta = Eta(steps=10, cells=4)
    assert eta.seconds() is None and clock(eta.seconds()) == "-:--:--"
    eta.trained(2.0)
    assert eta.seconds() == pytest.approx(9 * 2.0)
    eta.evaluated(30.0, cells=1)
    assert eta.seconds() == pytest.approx(9 * 2.0 + 3 * 30.0)
    assert clock(3725.2) == "1:02:05"


def test_rows_show_what_was_run() -> None:
    results = {
        "tasks": ["a", "b"],
        "matrix": {"matched": [[91.0, None], [88.25, 70.0]], "oracle": [[None, None], [None, None]]},
        "metrics": {"matched": {"ap": 79.125, "forgetting": 2.75, "maa": None}},
    }
    assert matrix_row(results, 0, "a") == "after 1. a (matched): a 91.0"
    assert matrix_row(results, 1, "b") == "after 2. b (matched): a 88.2 · b 70.0"
    same = {**results, "matrix": dict.fromkeys(("matched", "oracle"), results["matrix"]["matched"])}
    assert matrix_row(same, 1, "b") == "after 2. b (matched = oracle): a 88.2 · b 70.0"
    summary = matrix_summary(results, ["a", "b"])
    assert "oracle" not in summary and "ap 79.12 · forgetting 2.75" in summary
