"""The gate's instrument on a tiny random base: exact match, gradients, arithmetic."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import session
from torch import nn

from delo_llava.data.collate import Collator
from delo_llava.mini import build
from delo_llava.tasks import Record
from tools.mini_base import adapt, card, gate
from tools.mini_base.adapt import COMPLETE, NO_CONTEXT, NO_IMAGE, Training


@pytest.fixture(scope="module")
def base() -> adapt.Base:
    return adapt.Base.load(str(session("llava")))


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    picture = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    return [
        Record(f"r{i}", "ocr", "train", picture, "the card says mango", "what is shown", ("yes", "no")[i % 2])
        for i in range(4)
    ]


def test_exact_match_is_that_of_greedy_generation(base, records):
    first = records[0]
    training = Training(steps=40, rate=1e-2, batch=2)
    adapter = adapt.new_adapter(base, training)
    adapt.fit(base, adapter, [first], training)
    judged = [first, records[1], replace(first, answer="yes yes"), replace(first, answer="no")]
    modes = [COMPLETE, NO_IMAGE, COMPLETE, NO_CONTEXT]
    assert greedy(base, first, COMPLETE) == "yes"  # so that right and wrong answers are among the four
    for record, mode in zip(judged, modes, strict=True):
        assert adapt.exact_match(base, [record], [mode]) == float(greedy(base, record, mode) == record.answer)
    adapter.unload()


def greedy(base: adapt.Base, record: Record, presence: adapt.Presence) -> str:
    """What the stock `generate` says to a prompt without its answer."""
    prompts = Collator(base.backbone, base.collator.processor, 256, generation=True)
    inputs = prompts.collate([(record, presence)]).inputs
    with torch.no_grad():
        out = base.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return base.collator.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def _gradient(base: adapt.Base, adapter: nn.Module, judged: list[Record]) -> torch.Tensor:
    adapter.zero_grad()
    logits, tokens, _ = adapt.answer_logits(base, adapter, judged, [COMPLETE] * len(judged))
    nn.functional.cross_entropy(logits, tokens).backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


def test_gradients_are_the_same_after_an_evaluation(base, records):
    judged = records
    adapter = adapt.new_adapter(base, Training()).train()
    before = _gradient(base, adapter, judged)
    adapt.exact_match(base, judged, [NO_IMAGE] * 4)
    adapter.train()
    assert before.abs().sum() > 0 and torch.equal(before, _gradient(base, adapter, judged))
    adapter.unload()


def test_missing_rows_are_exact_and_halved():
    presence = adapt.missing_half_half(np.random.default_rng(0), 200, 0.7)
    assert (presence.count(NO_IMAGE), presence.count(NO_CONTEXT), presence.count(COMPLETE)) == (70, 70, 60)


def test_forgetting_and_verdicts():
    assert gate.forgetting(
        {"a": {"learned": 0.9, "at the end": 0.5}, "b": {"learned": 0.8, "at the end": 0.8}}
    ) == pytest.approx(0.4)
    good = {"complete": 0.9, "majority": 0.2, "no image": 0.5, "no context": 0.7}
    poor = good | {"complete": 0.79}
    told = gate.verdicts({"individual": {**{f"t{i}": good for i in range(5)}, "t5": poor}})
    assert all(v["pass"] for v in told)
    told = gate.verdicts({"individual": {**{f"t{i}": good for i in range(4)}, "t4": poor, "t5": poor}})
    assert [v["pass"] for v in told] == [False, True, True, True, True]


def test_bounds_keep_their_shares_with_more_or_fewer_tasks():
    assert [c.needed(6) for c in gate.CLAUSES] == [5, 6, 4, 2, 2]
    assert [c.needed(8) for c in gate.CLAUSES] == [7, 8, 6, 3, 3]
    assert [c.needed(2) for c in gate.CLAUSES] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_gate_runs_from_its_command_line(family, tmp_path, monkeypatch):
    monkeypatch.setattr(build.ensure, "__defaults__", (None, {"train": 8, "val": 4, "test": 4}))
    output = tmp_path / "gate.json"
    options = ["--recipe", "mini8", "--base", session(family), "--data", tmp_path, "--output", output]
    options += ["--steps", 2, "--batch", 4, "--tasks", "grounding", "ocr"]
    gate.main([str(o) for o in options])
    result = json.loads(output.read_text())
    assert set(result) >= {"individual", "missing", "sequential", "verdicts", "training"}
    assert list(result["individual"]) == ["ocr", "grounding"]
    assert (result["recipe"], result["data"]) == ("mini8", "mini8-v2")


def test_a_task_of_another_collection_is_refused(capsys):
    with pytest.raises(SystemExit):
        gate.main(["--recipe", "mini6", "--tasks", "grounding"])
    assert "mini6 has no task grounding" in capsys.readouterr().err


def test_the_card_tells_of_every_base_that_was_judged(tmp_path):
    """The mini8 card has a section for each result, and says where answers are that nothing tells."""
    result = {"recipe": "mini8", "data": "mini8-v0", "split": "val", "training": {"steps": 1}, "verdicts": []}
    gates = [result | {"base": name, "individual": {"ocr": {"complete": 0.5}}} for name in ("a", "b")]
    root = build.ensure(build.MINI8, tmp_path, {"train": 4, "val": 2, "test": 8})
    text = card.card(build.MINI8, root, gates)
    assert "## Scores on a\n" in text and "## Scores on b\n" in text and "| ocr | 0.500 |" in text
    assert "Measured on the val split of mini8-v0 with plain LoRA" in text
    assert text.startswith("# mini8 (mini8-v2)\n\nEight small multimodal tasks") and "/ neither" in text
