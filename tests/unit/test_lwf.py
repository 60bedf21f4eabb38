"""LwF: the divergence written out in float64, who the teacher is, what distillation holds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, Trained, items, story
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.adapters.own import TENSORS
from delo_llava.methods._answers import at_answers
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.lwf import TEACHER, Lwf, distillation_sum


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T² Σ p log(p/q), number by number."""
    total = 0.0
    for said, told in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        parts = [[math.exp(v / temperature) for v in row] for row in (told, said)]
        p, q = ([e / sum(row) for e in row] for row in parts)
        total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distillation_is_the_divergence_of_the_softened_outputs(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=random) for _ in range(2))
    found = float(distillation_sum(student, teacher, temperature))
    assert found == pytest.approx(by_hand(student, teacher, temperature), rel=1e-5)
    assert found != pytest.approx(float(distillation_sum(teacher, student, temperature)), rel=1e-2)
    assert float(distillation_sum(student, student.clone(), temperature)) == pytest.approx(0, abs=1e-6)


def test_only_positions_that_predict_an_answer_s_token_count() -> None:
    logits = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    labels = torch.tensor([[-100, -100, 5, 6], [1, -100, -100, 2]])
    expected = torch.stack([logits[0, 1], logits[0, 2], logits[1, 2]])
    assert torch.equal(at_answers(logits, labels), expected)


def begun(**options: Any) -> tuple[Bench, Any, Stage]:
    """The second stage of a story at its start."""
    told, bench = story("lwf"), Bench("lwf", **options)
    return bench, bench.begin(told.stages[1]), told.stages[1]


def logits(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch.inputs).logits
    return found


def test_the_teacher_is_the_model_before_the_stage_whatever_the_student_does() -> None:
    bench, model, stage = begun()
    assert isinstance(bench.method, Lwf)
    for layer in (m for m in model.modules() if isinstance(m, LowRankLayer)):
        layer.dropout = torch.nn.Dropout(0.5)
    batch = bench.batch(items("task1"))
    before = logits(bench.loaded(dict(stage.past)), batch)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                assert TEACHER not in name
                value.add_(0.05)
    with bench.method._teacher():
        assert torch.equal(logits(model, batch), before)
        assert torch.equal(logits(model, batch), before)  # the student's dropout is not the teacher's
    assert not torch.equal(logits(model, batch), logits(model, batch))
    assert not torch.equal(logits(model.eval(), batch), before)


def test_at_the_start_there_is_nothing_to_distil_and_later_there_is() -> None:
    bench, model, _ = begun()
    batch = bench.batch(items("task1"))
    sums = bench.method.loss_sums(model, batch)
    assert float(sums["distill"].detach()) == pytest.approx(0, abs=1e-5)
    counts = bench.method.counts(batch)
    assert counts["distill"] == counts["answer"] == float((batch.labels[:, 1:] != -100).sum())
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(0.02)
    sums = bench.method.loss_sums(model, batch)
    with bench.method._teacher():  # type: ignore[attr-defined]
        told = at_answers(logits(model, batch), batch.labels)
    expected = by_hand(at_answers(logits(model, batch), batch.labels), told, 2.0)
    assert float(sums["distill"].detach()) == pytest.approx(expected, rel=1e-3)
    sums["distill"].backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_first_stage_has_no_teacher_and_files_hold_the_student_alone() -> None:
    told, bench = story("lwf"), Bench("lwf")
    model = bench.begin(told.stages[0])
    batch = bench.batch(items("task0"))
    assert set(bench.method.loss_sums(model, batch)) == {"answer"}
    assert bench.method.counts(batch)["distill"] == 0
    first, second = (load_file(done.folder / TENSORS) for done in told.trained)
    assert first.keys() == second.keys() and not any(TEACHER in name for name in second)
    frozen = dict(told.trained[1].model.named_parameters())
    for name, value in first.items():
        stem, _, end = name.rpartition(".")
        assert torch.equal(frozen[f"{stem}.{TEACHER}.{end}"], value)  # the teacher stayed what it was


def test_distillation_holds_what_was_said_before(tmp_path: Path) -> None:
    told = story("lwf")
    first, stage = told.stages
    past = {first.name: Past(told.trained[0].folder, first.tasks)}

    def away(strength: float) -> float:
        bench = Bench("lwf", strength=strength)
        folder = tmp_path / str(strength)
        done: Trained = bench.train(Stage(1, stage.name, stage.tasks, past, stage.seed), folder)
        batch = bench.batch(items("task1"))
        pair = (logits(m, batch) for m in (done.model, bench.loaded(past)))
        return float(distillation_sum(*(at_answers(x, batch.labels) for x in pair), 2.0))  # type: ignore[arg-type]

    assert away(20.0) < 0.5 * away(0.0)
