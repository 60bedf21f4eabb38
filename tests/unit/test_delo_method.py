"""DeLo as a method: its auxiliary losses train, and its statistics count what they should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, items
from method_support import START

from delo_llava.data.collate import Batch, Collator


def batch(bench: Bench) -> Batch:
    """Four rows of the first task with the method's views."""
    collate = Collator(bench.backbone, bench.kit.processor, 2048)
    return collate(items("task0"), lambda rows: bench.method.views(rows, START))


@pytest.mark.parametrize(
    "options",
    [{"align": 0.5}, {"consistency": 0.5}, {"cross_modal": "linear", "align": 0.1, "consistency": 0.1}],
)
def test_auxiliary_losses_train(options: dict[str, Any], tmp_path: Path) -> None:
    """The terms are counted, weighted and differentiable through the whole method; their equations have their
    own tests.
    """
    bench = Bench("delo", **options)
    stage = bench.stages()[0]
    done = bench.train(stage, tmp_path / stage.name)
    assert all(not torch.equal(before, done.end[name]) for name, before in done.start.items())
    model, rows = bench.begin(stage), batch(bench)
    sums = bench.method.loss_sums(model, rows)
    for term in set(options) & {"align", "consistency"}:
        assert sums[term].requires_grad and torch.isfinite(sums[term])
        assert bench.method.counts(rows)[term] > 0
        assert bench.method.weights(START)[term] == options[term]


def test_keys_count_each_sample_once_and_never_a_dropped_view(tmp_path: Path) -> None:
    """Trap T6: a consistency forward must not enter the keys; every micro-batch enters exactly once, in
    each of the two epochs.
    """
    bench = Bench("delo", consistency=1.0)
    stage = bench.stages()[0]
    bench.train(stage, tmp_path / stage.name)
    keys: Any = bench.method
    assert keys._keys.tasks["task0"].count.tolist() == [2 * 6, 2 * 6, 2 * 8]
