"""MoRA: every linear against the whole adapted weight in float64; lengths, their decay, their freshness."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from method_support import START
from torch import Tensor

from delo_llava.adapters.lowrank import lowrank
from delo_llava.methods.mora import ADAPTER, MAGNITUDE, column_norms

ROWS = [*items("task0"), *items("task1")[:2]]


def parts(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B and m of a linear, float64."""
    a, b = (t.detach().double() for t in layer.pair(ADAPTER))
    lengths = layer.lowrank_H[ADAPTER][MAGNITUDE].weight.detach().double()[0]
    return layer.base_layer.weight.detach().double(), a, b, lengths


def whole(layer: Any) -> Tensor:
    """W' by the paper: columns of the adapted weight, of length one, times their lengths."""
    weight, a, b, lengths = parts(layer)
    moved = weight + layer.scale[ADAPTER] * b @ a
    columns = [lengths[j] * moved[:, j] / moved[:, j].norm() for j in range(moved.shape[1])]
    return torch.stack(columns, 1)


def seen(model: Any, batch: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """(layer, input, output) of every adapted linear."""
    found: list[tuple[Any, Tensor, Tensor]] = []
    layers = sum(lowrank(model).layers(), start=list[Any]())
    hooks = [m.register_forward_hook(lambda m, a, y: found.append((m, a[0], y))) for m in layers]
    with torch.no_grad():
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    return found


def begun() -> tuple[Bench, Any, Any]:
    bench = Bench("mora")
    return bench, bench.begin(bench.stages()[0]), bench.method


def test_every_linear_has_the_weight_whose_columns_have_their_own_lengths() -> None:
    told, bench = story("mora"), Bench("mora")
    model = bench.loaded(told.past(2))
    found = seen(model, bench.batch(ROWS))
    assert {layer.projector for layer, _, _ in found} == {True, False}
    other = 0
    for layer, x, y in found:
        weight, a, b, _ = parts(layer)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
        torch.testing.assert_close(y.double(), x.double() @ whole(layer).T + bias, rtol=1e-4, atol=5e-5)
        plain = x.double() @ (weight + layer.scale[ADAPTER] * b @ a).T + bias
        other += not torch.allclose(y.double(), plain, rtol=1e-3, atol=1e-3)
    assert other, "and it is not the pair alone"


def test_a_stage_begins_at_the_weight_and_not_at_twice_of_it() -> None:
    bench, model, method = begun()
    for layer in sum(lowrank(model).layers(), start=list[Any]()):
        weight, _, _, lengths = parts(layer)
        torch.testing.assert_close(lengths, weight.norm(dim=0), rtol=1e-5, atol=1e-7)
        assert torch.equal(lengths.float(), method._norms[layer.name])


@pytest.mark.parametrize("entries", [1, 7, 1 << 22])
def test_lengths_of_columns_are_those_of_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    """However many entries are made at once."""
    monkeypatch.setattr("delo_llava.methods.mora.ENTRIES", entries)
    torch.manual_seed(0)
    weight, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    weight[:, 3], a[:, 3] = 0, 0
    found = column_norms(weight, a, b, 0.5)
    expected = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert found[3] > 0


class Kept:
    """`Trained` over given values."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.given = values

    def values(self) -> dict[str, Tensor]:
        return self.given


def test_a_step_s_lengths_are_those_of_its_own_weights() -> None:
    """Not of the step before; the length is a constant, through which no gradient goes."""
    bench, model, method = begun()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if MAGNITUDE in name else 0.3))
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    stale = {name: norm.clone() for name, norm in method._norms.items()}
    method.after_step(Kept(values), values, START)
    for layer, x, y in seen(model, bench.batch(ROWS)):
        expected = x.double() @ whole(layer).T
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
        torch.testing.assert_close(y.double(), expected + bias, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(stale[layer.name], method._norms[layer.name], rtol=1e-2)
        assert not method._norms[layer.name].requires_grad
    assert not method._changed, "made once, not in every forward"
    again = Bench("mora")
    other = again.begin(again.stages()[0])
    other.load_state_dict(model.state_dict())
    again.method.load_state_dict(other, method.state_dict())
    assert torch.equal(bench.logits(model, ROWS), again.logits(other, ROWS)), "as a run that goes on"


def test_lengths_are_not_decayed() -> None:
    bench, model, method = begun()
    train = bench.config.train.model_copy(update={"weight_decay": 0.1})
    decays = {id(p): group["weight_decay"] for group in method.groups(model, train) for p in group["params"]}
    trained = {n: decays[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert len(decays) == len(trained)
    assert {n: 0.0 if MAGNITUDE in n else 0.1 for n in trained} == trained


def test_what_is_merged_is_the_difference_to_the_base() -> None:
    told, bench = story("mora"), Bench("mora")
    model = bench.loaded(told.past(2))
    layers = {layer.name: layer for part in lowrank(model).layers() for layer in part}
    for name, update in bench.method.updates(model):
        weight = layers[name].base_layer.weight.double()
        torch.testing.assert_close(weight + update, whole(layers[name]), rtol=1e-4, atol=1e-6)
