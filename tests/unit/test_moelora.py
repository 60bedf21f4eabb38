"""MoELoRA: the sum over experts written out in float64, the router's gradient, the chain of tasks."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from torch import Tensor

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.errors import DeloError
from delo_llava.methods._experts import gates, weighted
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods.base import Stage


def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def live(**options: Any) -> tuple[Bench, Any]:
    """A bench and its model at the start of the first stage, whose B are drawn."""
    bench = Bench("moelora", **options)
    model = bench.begin(Stage(0, "task0"))
    for layer in layers(model):
        torch.nn.init.normal_(layer.lowrank_B[ADAPTER].weight, std=0.1)  # type: ignore[arg-type]
    return bench, model


def by_hand(layer: LowRankLayer, x: Tensor, experts: int, top_k: int) -> Tensor:
    """W₀x + s Σ_i g_i B_i A_i x, token by token, in float64."""
    a, b, router = (getattr(layer, f"lowrank_{part}")[ADAPTER].weight.double() for part in "ABR")
    width = len(a) // experts
    rows = []
    for token in x.double().flatten(0, -2):
        p = torch.exp(router @ token)
        p = p / p.sum()
        best = sorted(range(experts), key=lambda i: -float(p[i]))[: top_k or experts]
        total = sum(p[i] for i in best)
        delta = torch.zeros(layer.out_features, dtype=torch.float64)
        for i in best:
            block = slice(i * width, (i + 1) * width)
            delta = delta + p[i] / total * (b[:, block] @ (a[block] @ token))
        rows.append(2.0 * delta)
    return layer.base_layer(x).double() + torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_every_linear_adds_the_weighted_experts(top_k: int) -> None:
    bench, model = live(experts=4, rank=8, top_k=top_k)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers(model):
        layer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.name, (args[0], out)))
    with torch.no_grad():
        model(**bench.batch(items("task0")).inputs)
        for layer in layers(model):
            x, y = seen[layer.name]
            assert torch.allclose(y.double(), by_hand(layer, x, 4, top_k), atol=1e-5), layer.name


def test_weights_sum_to_one_and_only_the_chosen_act() -> None:
    scores = torch.randn(5, 3, 4, dtype=torch.float64)
    for top_k in range(5):
        gate = gates(scores, top_k)
        assert torch.allclose(gate.sum(-1), torch.ones(5, 3, dtype=torch.float64))
        assert bool(((gate > 0).sum(-1) == (top_k or 4)).all())
    tied = gates(torch.zeros(1, 4), 2)
    assert tied.tolist() == [[0.5, 0.5, 0.0, 0.0]], "ties go to the first"
    assert weighted(torch.ones(1, 4), torch.tensor([[2.0, 3.0]])).tolist() == [[2, 2, 3, 3]]


def test_one_chosen_expert_still_teaches_the_router() -> None:
    """The value is exactly the choice; the gradient is that of its softmax probability. Negative control:
    renormalised over the one choice, as the releases do it, there is none.
    """
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(6, 4, dtype=torch.float64)
    gate = gates(scores, 1)
    assert set(gate.detach().unique().tolist()) == {0.0, 1.0}
    (got,) = torch.autograd.grad((gate * gain).sum(), scores)
    best = gate.detach().argmax(-1, keepdim=True)
    chosen = (scores.softmax(-1) * gain).gather(-1, best)
    (expected,) = torch.autograd.grad(chosen.sum(), scores)
    assert torch.allclose(got, expected) and got.abs().sum() > 0.1
    constant = scores.gather(-1, best).softmax(-1) * gain.gather(-1, best)
    (none,) = torch.autograd.grad(constant.sum(), scores)
    assert none.abs().max() == 0


@pytest.mark.parametrize("top_k", [0, 1])
def test_every_router_gets_a_gradient(top_k: int) -> None:
    bench, model = live(experts=4, rank=8, top_k=top_k)
    batch = bench.batch(items("task0"))
    bench.method.loss_sums(model, batch)["answer"].backward()
    for layer in layers(model):
        gradient: Any = layer.lowrank_R[ADAPTER].weight.grad  # type: ignore[union-attr]
        assert gradient.abs().sum() > 0, layer.name


def test_the_first_task_starts_narrow_and_the_second_goes_on() -> None:
    model = Bench("moelora", experts=2, rank=8).begin(Stage(0, "task0"))
    drawn = torch.cat([layer.lowrank_A[ADAPTER].weight.flatten() for layer in layers(model)])  # type: ignore[arg-type]
    assert abs(drawn.detach().std().item() - 0.01) < 3e-4 and drawn.dtype == torch.float32
    told = story("moelora")
    for name, value in told.trained[1].start.items():
        assert torch.equal(value, told.trained[0].end[name]), name


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(DeloError, match="multiple of the number of experts"):
        Bench("moelora", experts=4, rank=6)
    with pytest.raises(DeloError, match="More experts cannot act"):
        Bench("moelora", experts=2, top_k=3)
