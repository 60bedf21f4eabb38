"""`joint` trains `lora`'s adapter on all tasks in one stage; `zero_shot` trains and keeps nothing."""

import pytest
import torch
from contract_support import ALONE, Bench, Trained, examples, items, story

from delo_llava.errors import DeloError
from delo_llava.methods.base import Stage
from delo_llava.training.fit import fit


def test_joint_is_lora_on_the_union() -> None:
    told = story("joint")
    assert [(s.name, [t.name for t in s.tasks]) for s in told.stages] == [("joint", ["task0", "task1"])]
    lora = Bench("lora")
    model = lora.begin(told.stages[0])
    union = examples("task0") + examples("task1")
    mixture = lora.method.mixture(told.stages[0], union, {})
    fitted = fit(model, lora.method, mixture, lora.config, ALONE, lora.kit, seed=told.stages[0].seed)
    done: Trained = told.trained[0]
    assert fitted.examples == 16 and fitted.tensors.keys() == done.end.keys()
    assert all(torch.equal(value, done.end[name]) for name, value in fitted.tensors.items())


def test_joint_learns_from_every_task() -> None:
    told = story("joint")
    for task in ("task0", "task1"):
        rows = items(task)
        batch = told.bench.batch(rows)
        after, before = (
            float(told.bench.method.loss_sums(m, batch)["answer"])
            for m in (told.bench.loaded(told.past(1)), told.bench.base())
        )
        assert after < before


def test_zero_shot_has_no_stage_and_no_size() -> None:
    bench = Bench("zero_shot")
    assert bench.stages() == []
    found = bench.method.footprint(bench.base())
    assert (found.parameters, found.stored_bytes, found.every_task) == (0, 0, False)
    model = bench.loaded({})
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(bench.logits(model, items("task0")), bench.logits(bench.base(), items("task0")))
    with pytest.raises(DeloError, match="trains nothing"):
        bench.method.save(model, Stage(0, "x"), bench.config.output)  # type: ignore[arg-type]
