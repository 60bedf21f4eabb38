"""Missing-aware prompts: which pattern reads which prompt, and what a task without a pattern leaves alone."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items
from prompts_support import HEADS, Built, queries

from delo_llava.methods._prompts import prompts_of
from delo_llava.methods.base import Stage

PRESENCE = [(True, True), (False, True), (True, False), (False, False), (True, True)]


@pytest.fixture(scope="module")
def built() -> Built:
    return Built("map_prompts")


def test_a_row_reads_the_prompt_of_its_pattern(built: Built) -> None:
    prompts = built.held()["patterns"]["prompts"]
    plan = built.plan(queries(PRESENCE), PRESENCE)
    for row, (image, text) in enumerate(PRESENCE):
        mine = prompts[2 * image + text]
        for layer in plan.keys:
            for head in range(HEADS):
                assert torch.equal(plan.keys[layer][row, head], mine[layer, 0, head])
                assert torch.equal(plan.values[layer][row, head], mine[layer, 1, head])
    assert len({prompt.flatten()[0].item() for prompt in prompts}) == 4


def test_every_pattern_that_is_there_learns_and_others_keep_their_bits(tmp_path: Any) -> None:
    bench = Bench("map_prompts", "llava", "none", "--train.weight_decay=0.5")
    done = bench.train(bench.stages()[0], tmp_path / "stage")
    (name,) = done.start
    moved = [not torch.equal(a, b) for a, b in zip(done.start[name], done.end[name], strict=True)]
    assert moved == [False, True, True, True], "no record of the tiny task has neither"
    changed = (done.start[name] != done.end[name])[1:]
    assert changed.flatten(4).any(-1).all(), "keys and values of every layer and head"


def test_no_pattern_starts_at_zero_or_without_a_gradient(built: Built) -> None:
    rows = [(record, seen) for (record, _), seen in zip(items("task0"), PRESENCE[:4], strict=True)]
    built.method.loss_sums(built.model, built.bench.batch(rows))["answer"].backward()
    prompts: Any = prompts_of(built.model).trained["patterns"].prompts
    assert (prompts.detach().flatten(1).abs().amax(1) > 0).all()
    assert (prompts.grad.flatten(4).abs().amax(-1) > 0).all()


def test_the_length_can_match_another_method() -> None:
    def trained(name: str, **options: Any) -> int:
        model = Bench(name, **options).begin(Stage(0, "task0"))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    each = trained("map_prompts", length=1)
    assert abs(trained("map_prompts", length="match") - trained("delo")) <= each / 2
