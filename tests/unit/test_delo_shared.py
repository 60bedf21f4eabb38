"""Linears that read one tensor share a product, and where they do not, each is computed alone: both are the
plain formula.
"""

from typing import Any

import pytest
import torch
from test_delo_layer import D_IN, ROWS, TASKS, TOKENS, build, plan_for, selection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delo_llava.adapters.carrier import Route
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.plan import RoutePlan
from delo_llava.methods.delo.shared import Siblings

F64 = torch.float64
OWN = pytest.mark.parametrize("own", [True, False])
BIAS = pytest.mark.parametrize("bias", [True, False])


def family(bias: bool = False, count: int = 3, dtype: torch.dtype = F64) -> list[DeloLayer]:
    """Layers of one plan's only slot, each with factors of its own, on one carrier."""
    made = [build(dtype=dtype) for _ in range(count)]
    for number, layer in enumerate(made):
        draw = torch.Generator().manual_seed(number)
        layer.carrier = made[0].carrier
        layer.base_layer = nn.Linear(D_IN, 7 + number, bias=bias).to(dtype).requires_grad_(False)
        for task in TASKS:
            layer.delo_B[task] = nn.Embedding(10, 7 + number, dtype=dtype)
            for pools in (layer.delo_A, layer.delo_B):
                pools[task].weight.data.normal_(generator=draw)
        layer.out_features = 7 + number
    siblings = Siblings(made)
    for layer in made:
        layer.siblings = siblings
    return made


def naive(layer: DeloLayer, x: Tensor, plan: RoutePlan, is_image: Tensor, own: bool) -> Tensor:
    """The formula token by token, ΔW written out."""
    rows = []
    for i, task in enumerate(plan.tasks):
        chosen = plan.selection
        gates = (None, None)
        if chosen.image_gate is not None and chosen.text_gate is not None:
            gates = (chosen.image_gate[i, 0], chosen.text_gate[i, 0])
        image = wide(layer, task, chosen.image_a[i, 0], chosen.image_b[i, 0], gates[0], 0)
        text = wide(layer, task, chosen.text_a[i, 0], chosen.text_b[i, 0], gates[1], 5)
        masks = (is_image[i], ~is_image[i]) if own else (torch.ones(TOKENS), torch.ones(TOKENS))
        parts = [m.to(x.dtype).unsqueeze(1) * (x[i] @ w.T) for m, w in zip(masks, (image, text), strict=True)]
        rows.append(layer.base_layer(x[i]) + parts[0] + parts[1])
    return torch.stack(rows)


def wide(layer: DeloLayer, task: str, a: Tensor, b: Tensor, gate: Tensor | None, first: int) -> Tensor:
    total = torch.zeros(layer.out_features, D_IN, dtype=F64)
    for j in range(len(a)):
        pair = layer.delo_B[task].weight[first + b[j]], layer.delo_A[task].weight[first + a[j]]
        total = total + (1.0 if gate is None else gate[j]) * torch.outer(*pair)
    return 1.7 * total


def together(layers: list[DeloLayer], x: Tensor, plan: RoutePlan) -> list[Tensor]:
    with layers[0].carrier.entered(Route(None, plan, 0)):  # type: ignore[arg-type]
        return [layer(x) for layer in layers]


def case(own: bool, tasks: Any = ("first",) * ROWS) -> tuple[RoutePlan, Tensor, Tensor]:
    plan, is_image = plan_for(selection(True), list(tasks), own)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=F64, generator=torch.Generator().manual_seed(1))
    return plan, is_image, x.requires_grad_()


@OWN
@BIAS
@pytest.mark.parametrize("tasks", [("first",) * ROWS, ("second", "first", "first", "second")])
def test_siblings_are_the_plain_formula_with_its_gradients(own: bool, bias: bool, tasks: Any) -> None:
    layers = family(bias)
    plan, is_image, x = case(own, tasks)
    weights = [
        x,
        *(p[t].weight for layer in layers for p in (layer.delo_A, layer.delo_B) for t in set(tasks)),
    ]
    found, expected = (
        together(layers, x, plan),
        [naive(layer, x, plan, is_image, own) for layer in layers],
    )
    assert layers[0].siblings is not None and not layers[0].siblings.apart(plan)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(sum(y.square().sum() for y in ys), weights) for ys in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@BIAS
def test_gradients_are_those_of_finite_differences(bias: bool) -> None:
    layers = family(bias)
    plan, _, x = case(own=True)
    weights = [layer.delo_A["first"].weight for layer in layers[:2]] + [layers[1].delo_B["first"].weight]

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(together(layers, x, plan))

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


def test_recomputation_gives_the_same_gradients() -> None:
    layers = family()
    plan, _, x = case(own=True)
    weights = [x, *(layer.delo_A["first"].weight for layer in layers)]

    def run(x: Tensor) -> Tensor:
        return torch.cat(together(layers, x * 1.0, plan), -1).square().sum()

    plain = torch.autograd.grad(run(x), weights)
    again = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), weights)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_the_first_computes_for_all_and_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = family()
    plan, _, x = case(own=True)
    products: list[int] = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: products.append(b.shape[-1]) or product(a, b))
    together(layers, x, plan)
    assert products == [3 * 6], "one product for three layers of six factors"
    assert layers[0].siblings is not None and layers[0].siblings._held is None


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_that_are_given_other_tensors_are_computed_alone(recomputed: bool) -> None:
    """In the forward that shows it, too, and when checkpointing repeats that forward."""
    layers = family()
    siblings = layers[0].siblings
    assert siblings is not None
    for once in range(2):
        plan, is_image, x = case(own=True)

        def run(x: Tensor, plan: RoutePlan = plan) -> Tensor:
            with layers[0].carrier.entered(Route(None, plan, 0)):  # type: ignore[arg-type]
                return torch.cat([layer(x * 1.0) for layer in layers], -1)

        found = checkpoint(run, x, use_reentrant=False) if recomputed else run(x)
        expected = torch.cat([naive(layer, x, plan, is_image, True) for layer in layers], -1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        grads = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
        assert siblings.apart(plan) == bool(once)


def test_what_the_base_gave_is_written_over_only_where_nobody_else_has_it() -> None:
    """A hook's copy of the base's output stays what it was."""
    layers = family(count=1)
    plan, _, x = case(own=True)
    seen: list[Tensor] = []
    hook = layers[0].base_layer.register_forward_hook(lambda m, a, y: seen.append(y))
    [watched] = together(layers, x, plan)
    hook.remove()
    [alone] = together(layers, x, plan)
    assert torch.equal(watched, alone)
    torch.testing.assert_close(seen[0], nn.functional.linear(x, layers[0].base_layer.weight), rtol=0, atol=0)
    assert not torch.equal(seen[0], watched)


def test_an_input_that_was_changed_in_between_is_not_taken_for_the_same() -> None:
    layers = family(count=2)
    plan, is_image, x = case(own=True)
    with torch.no_grad(), layers[0].carrier.entered(Route(None, plan, 0)):  # type: ignore[arg-type]
        layers[0](x)
        x.mul_(2.0)
        second = layers[1](x)
    torch.testing.assert_close(second, naive(layers[1], x, plan, is_image, True), rtol=1e-12, atol=1e-12)


def test_weights_that_an_engine_shards_are_used_in_their_own_module_only() -> None:
    layers = family()
    plan, is_image, x = case(own=True)
    layers[0].delo_A["second"].weight.ds_id = 0  # as ZeRO-3 marks them
    for layer, found in zip(layers, together(layers, x, plan), strict=True):
        torch.testing.assert_close(found, naive(layer, x, plan, is_image, True), rtol=1e-12, atol=1e-12)
    siblings = layers[0].siblings
    assert siblings is not None and siblings.apart(plan) and siblings._held is None
