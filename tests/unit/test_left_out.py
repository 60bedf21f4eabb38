"""A step that made no update leaves no trace in what methods count while they train."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items
from torch import Tensor

from delo_llava.engines.single import SingleTrained
from delo_llava.methods.base import Clock, Method, overrides
from delo_llava.registry import load_plugin, plugin_names

ROWS = items("task0")
#: PRISM counts nothing in such a step (`before_step` looks at the gradients itself); PCLR's is tested beside
#: its compression.
ELSEWHERE = {"prism", "pclr"}


def step(bench: Bench, model: Any, number: int) -> None:
    """What the loop does with two micro-batches, but for the update."""
    clock = Clock(number, 8, 8)
    for rows in (ROWS[:2], ROWS[2:]):
        batch = bench.batch(rows)
        bench.method.loss_sums(model, batch)["answer"].backward()
        bench.method.after_backward(model, batch, clock)
    if overrides(bench.method, "before_step"):
        bench.method.before_step(SingleTrained({}, None), clock)  # type: ignore[arg-type]


def state(method: Method) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def test_every_method_that_counts_can_take_it_back() -> None:
    counting = {n for n in plugin_names("method") if _has(n, "after_backward")}
    assert counting - ELSEWHERE == {n for n in plugin_names("method") if _has(n, "left_out")} - ELSEWHERE
    assert counting >= {"delo", "clmoe", "dac"}


def _has(name: str, hook: str) -> bool:
    return getattr(load_plugin("method", name), hook) is not getattr(Method, hook)


@pytest.mark.parametrize("name", ["delo", "clmoe", "dac"])
def test_what_a_step_counted_is_taken_back(name: str) -> None:
    bench = Bench(name)
    model = bench.begin(bench.stages()[0])
    step(bench, model, 2)
    before = state(bench.method)
    step(bench, model, 3)
    bench.method.left_out(Clock(3, 8, 8))
    after = state(bench.method)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    bench.method.left_out(Clock(4, 8, 8))  # a step in which this rank counted nothing
    assert all(torch.equal(tensor, before[n]) for n, tensor in state(bench.method).items())
    step(bench, model, 5)
    again = state(bench.method)
    assert any(not torch.equal(again[n], before[n]) for n in before), "a step that is made does count"
