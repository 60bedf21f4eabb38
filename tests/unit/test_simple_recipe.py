"""The simple recipe: W_t = W_{t−1} + s·B_t A_t for any number of tasks, at a rate of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, examples, items
from safetensors.torch import load_file

from delo_llava.adapters.merging import adapter_updates
from delo_llava.adapters.own import TENSORS
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.replay import MEMORY
from delo_llava.strict import read_json

ROWS = items("task0")


@pytest.mark.parametrize(("options", "peaks"), [({}, (2e-5, 2e-5)), ({"lr": None}, (0.01, 0.002))])
def test_the_rate_is_the_recipe_s_own_unless_the_run_s_is_asked_for(
    options: dict[str, Any], peaks: tuple[float, float]
) -> None:
    bench = Bench("simple_recipe", **({"lr": 2e-5} | options))
    groups = bench.method.groups(bench.begin(Stage(0, "first")), bench.config.train)
    assert tuple(group["peak"] for group in groups) == peaks
    assert [group["name"] for group in groups] == ["language", "projector"]


def test_every_task_adds_a_pair_to_what_stands(tmp_path: Path) -> None:
    bench, past = Bench("simple_recipe", rank=2), dict[str, Past]()
    for i in range(3):
        stage = Stage(i, f"s{i}", bench.stages()[0].tasks, dict(past), seed=i)
        with torch.no_grad():
            begun = bench.logits(bench.begin(stage).eval(), ROWS)
        assert torch.allclose(begun, bench.logits(bench.loaded(dict(past)), ROWS), atol=1e-5)
        done = bench.train(stage, tmp_path / stage.name)
        assert all(".s" + str(i) + "." in name for name in done.start), "earlier pairs are frozen"
        past[stage.name] = Past(done.folder, stage.tasks)
        assert torch.equal(bench.logits(done.model, ROWS), bench.logits(bench.loaded(dict(past)), ROWS))
    stored = [load_file(known.folder / TENSORS) for known in past.values()]
    found = dict(adapter_updates(bench.loaded(past)))
    for name, update in found.items():
        key = f"base_model.model.{name}.lowrank_"
        parts = [2.0 * t[f"{key}B.weight"].double() @ t[f"{key}A.weight"].double() for t in stored]
        assert torch.allclose(update, sum(parts), atol=1e-8), name
        assert not torch.allclose(update, parts[-1], atol=1e-4), "not the last one alone"


@pytest.mark.parametrize("replay", [0, 3])
def test_records_are_replayed_by_an_option(replay: int, tmp_path: Path) -> None:
    bench = Bench("simple_recipe", replay=replay)
    first, second = bench.stages()
    done = bench.train(first, tmp_path / "first")
    assert (done.folder / MEMORY).exists() == bool(replay)
    later = Stage(1, second.name, second.tasks, {first.name: Past(done.folder, first.tasks)})
    parts = bench.method.mixture(later, examples("task1"), {first.name: examples("task0")})
    assert [len(part.examples) for part in parts] == [8, 3][: 1 + bool(replay)]
    assert {part.share for part in parts} == {None}
    if replay:
        kept = {record.id for record, _ in (parts[1].examples[i] for i in range(3))}
        assert kept == set(read_json(done.folder / MEMORY, "", "")["task0"])
