"""KeepLoRA: gradients of frozen linears against autograd, sketches against dense SVD, what is protected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from method_support import Given, alone
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.backbones._quant import dense_weight
from delo_llava.backbones.base import adapted_linears
from delo_llava.errors import DeloError
from delo_llava.methods.base import Stage
from delo_llava.methods.keeplora import (
    FILE,
    LIMITED,
    Directions,
    GradientSketch,
    completed,
    missing,
    weight_directions,
)

F64 = torch.float64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def factor(layer: LowRankLayer, part: str, name: str) -> Tensor:
    found: Tensor = getattr(layer, f"lowrank_{part}")[name].weight.detach().double()
    return found


def gradient_of(rank: int, inputs: int = 30, outputs: int = 20) -> Tensor:
    """A transposed gradient, d_in×d_out, with falling singular values."""
    left = torch.linalg.qr(torch.randn(inputs, rank, dtype=F64)).Q
    right = torch.linalg.qr(torch.randn(outputs, rank, dtype=F64)).Q
    return (left * torch.logspace(0, -1, rank, dtype=F64)) @ right.T


def sketched(gradient: Tensor, width: int, parts: int = 1) -> GradientSketch:
    """Added up token by token in a few parts: each row of the identity is a token's input."""
    sketch = GradientSketch(*gradient.shape, width, 7, CPU)
    for rows in torch.arange(len(gradient)).chunk(parts):
        sketch.add(torch.eye(len(gradient), dtype=F64)[rows], gradient[rows])
    return sketch.reduced(alone, 1.0)


# ---- sketches
def test_a_gradient_of_few_directions_is_known_exactly() -> None:
    gradient, basis = gradient_of(6), torch.linalg.qr(torch.randn(30, 4, dtype=F64)).Q
    rest = gradient - basis @ (basis.T @ gradient)
    left, values, _ = torch.linalg.svd(rest)
    for parts in (1, 5):
        found = sketched(gradient, 6, parts).outside(basis)
        assert found.columns.shape == (30, 6)
        assert torch.allclose(found.energy, values[:6] ** 2)
        assert torch.allclose((found.columns * left[:, :6]).sum(0).abs(), torch.ones(6, dtype=F64))
        assert torch.allclose(found.inside, ((basis.T @ gradient) ** 2).sum())


def test_a_gradient_of_many_directions_is_known_by_its_leading_ones() -> None:
    """Three strong directions over a floor of weak ones, of which there are more than the sketch is wide."""
    gradient = gradient_of(3) + 0.01 * gradient_of(20)
    nothing = torch.zeros(30, 0, dtype=F64)
    left = torch.linalg.svd(gradient).U[:, :3]
    found = sketched(gradient, 10).outside(nothing).columns[:, :3]
    assert float(torch.linalg.svdvals(left.T @ found).min()) > 0.99


def test_no_gradient_has_no_direction() -> None:
    found = sketched(torch.zeros(30, 20, dtype=F64), 6).outside(torch.zeros(30, 0, dtype=F64))
    assert found.columns.shape == (30, 0) and missing(found, 0.99) == 0


def test_directions_are_added_until_enough_is_explained() -> None:
    energy = torch.tensor([5.0, 3.0, 1.5, 0.4, 0.1], dtype=F64)
    columns, inside = torch.eye(5, dtype=F64), torch.tensor(10.0, dtype=F64)
    assert missing(Directions(columns, energy, inside), 0.9) == 2, "18 of 20"
    assert missing(Directions(columns, energy, inside), 0.5) == 0, "10 of 20 are held already"
    assert missing(Directions(columns, energy, inside), 0.99) == 4
    assert missing(Directions(columns, energy, inside), 0.999) == 5


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
def test_the_weight_s_directions_are_those_of_its_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape)
    _, values, right = torch.linalg.svd(weight.double())
    share = (values**2).cumsum(0) / (values**2).sum()
    count = int((share < 0.6).sum())
    found = weight_directions(weight, 0.6)
    assert found.shape == (shape[1], count)
    assert torch.allclose(found @ found.T, right[:count].T @ right[:count], atol=1e-9)
    assert weight_directions(weight, 0.0).shape[1] == 1, "at least one"


def test_what_is_lacking_is_drawn_outside_everything() -> None:
    basis = torch.linalg.qr(torch.randn(30, 9, dtype=F64)).Q
    found = torch.linalg.qr(torch.randn(30, 12, dtype=F64)).Q[:, 9:]
    found = torch.linalg.qr(found - basis @ (basis.T @ found)).Q
    whole = completed(found, basis, 8, 3, "a linear")
    assert torch.allclose(whole.T @ whole, torch.eye(8, dtype=F64), atol=1e-10)
    assert float((basis.T @ whole).abs().max()) < 1e-10
    assert torch.allclose((whole[:, :3] * found).sum(0).abs(), torch.ones(3, dtype=F64))
    assert bool((whole[:, :3].gather(0, whole[:, :3].abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.equal(completed(-found, basis, 8, 3, "a linear")[:, :3], whole[:, :3]), "signs are fixed"
    with pytest.raises(DeloError, match="21 directions left"):
        completed(found, basis, 22, 3, "a linear")


# ---- the method
def dense_gradients(bench: Bench, model: Any) -> dict[str, Tensor]:
    """∂L/∂W of every linear by autograd on the weight itself, mean over samples."""
    sums: dict[str, Tensor] = {}
    weights = {layer.name: layer.base_layer.weight.requires_grad_() for layer in layers(model)}  # type: ignore[operator, union-attr]
    for item in items("task0"):
        batch = bench.batch([item])
        loss = bench.method.loss_sums(model, batch)["answer"] / bench.method.counts(batch)["answer"]
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), found, strict=True):
            value = torch.zeros_like(weight) if gradient is None else gradient
            sums[name] = sums.get(name, torch.zeros_like(weight)) + value / 4
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: value.double() for name, value in sums.items()}


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_is_the_leading_part_of_the_gradient_outside_the_weight(quant: str) -> None:
    """Against dense gradients and singular vectors; in 4 bit only the invariants, as its weight has none."""
    bench = Bench("keeplora", "llava", quant, rank=16, energy=0.3)
    model = bench.begin(Stage(0, "task0", seed=5))
    bench.method.prepare(model, Given([bench.batch([item]) for item in items("task0")]), alone)
    dense = dense_gradients(bench, model) if quant == "none" else {}
    checked = 0
    for layer in layers(model):
        a = factor(layer, "A", "task0")
        weight = dense_weight(layer.base_layer).double()
        basis = weight_directions(weight, 0.3)
        assert torch.allclose(a @ a.T, torch.eye(16, dtype=F64), atol=1e-5), layer.name
        assert float((a @ basis).norm()) < 1e-4, layer.name
        if layer.name in dense:
            gradient = dense[layer.name].T
            rest = gradient - basis @ (basis.T @ gradient)
            energy = torch.linalg.svdvals(rest) ** 2
            held = float(((a @ rest) ** 2).sum() / energy[:16].sum())
            assert held > 0.9, (layer.name, held)
            if int((energy > 1e-12 * energy[0]).sum()) <= 32:  # the sketch is exact
                assert held > 1 - 1e-5, (layer.name, held)
                checked += 1
    assert checked or quant == "nf4"


def test_only_b_is_trained_and_no_direction_that_matters_moves() -> None:
    """The second task's ΔW = s·BA does nothing to what the weight needs nor to what the first task's gradient
    had; and A has the bits it was given.
    """
    told = story("keeplora")
    for done in told.trained:
        assert done.end and all("lowrank_B" in name for name in done.end)
    method: Any = told.bench.method
    told.bench.begin(told.stages[1])
    earlier = method._earlier
    assert earlier and all(basis.shape[1] > 0 for basis in earlier.values())
    loaded = told.bench.loaded(told.past(2))
    for layer in layers(loaded):
        change = factor(layer, "B", "task1") @ factor(layer, "A", "task1")
        assert float(change.norm()) > 1e-4
        for basis in (weight_directions(dense_weight(layer.base_layer), 0.3), earlier[layer.name].double()):
            assert float((change @ basis).norm() / change.norm()) < 1e-4, layer.name
        loose = factor(layer, "B", "task0") @ factor(layer, "A", "task0")
        assert float((loose @ earlier[layer.name].double()).norm() / loose.norm()) > 1e-2, "negative control"


def test_protected_directions_stay_orthonormal_and_grow() -> None:
    told = story("keeplora")
    model = told.bench.begin(Stage(2, "task2", past=told.past(2)))
    method: Any = told.bench.method
    for layer in layers(model):
        basis = method._basis(layer).double()
        assert float((basis.T @ basis - torch.eye(basis.shape[1], dtype=F64)).abs().max()) < 1e-5
        assert basis.shape[1] > method._weights[layer.name].shape[1]


def test_pairs_side_by_side_are_the_merged_weights() -> None:
    told = story("keeplora")
    model = told.bench.loaded(told.past(2))
    rows = items("task1")
    expected = told.bench.logits(model, rows)
    merged = told.bench.base()
    for layer in layers(model):
        weight = merged.get_submodule(layer.name).weight.data
        for name in ("task0", "task1"):
            weight += (layer.scale[name] * factor(layer, "B", name) @ factor(layer, "A", name)).float()
    with torch.no_grad():
        assert torch.allclose(merged(**told.bench.batch(rows).inputs).logits, expected, atol=1e-4)


def test_going_on_needs_the_chosen_factors() -> None:
    """A is frozen, so no checkpoint of trained weights has it: the method's own state does."""
    bench = Bench("keeplora")
    model = bench.begin(Stage(0, "task0"))
    bench.method.prepare(model, Given([bench.batch([item]) for item in items("task0")]), alone)
    state = {name: tensor.clone() for name, tensor in bench.method.state_dict().items()}
    other = Bench("keeplora")
    again = other.begin(Stage(0, "task0"))
    other.method.load_state_dict(again, state)
    for one, two in zip(layers(model), layers(again), strict=True):
        assert torch.equal(factor(one, "A", "task0"), factor(two, "A", "task0"))
    assert all(torch.equal(t, state[n]) for n, t in other.method.state_dict().items()) and state


def test_a_task_that_needs_no_new_direction_leaves_a_file_all_the_same(tmp_path: Path) -> None:
    """An empty tensor would not be published."""
    told = story("keeplora")
    method: Any = told.bench.method
    model = told.bench.begin(told.stages[0])
    name = layers(model)[0].name
    method._appended = {name: torch.zeros(64, 0), "other": torch.eye(64, 2)}
    method.save(model, told.stages[0], tmp_path)
    assert list(load_file(tmp_path / FILE)) == ["other"]


def test_a_matched_rank_counts_what_is_trained() -> None:
    bench = Bench("keeplora", rank="match")
    base = bench.base()
    outputs = sum(out for _, out in adapted_linears(base, bench.backbone).values())
    trained = bench.method.footprint(base).parameters
    wanted = Bench("delo").method.footprint(base).parameters
    assert trained % outputs == 0 and abs(trained - wanted) <= outputs / 2


def test_a_later_task_learns_in_the_directions_that_are_left(tmp_path: Path) -> None:
    bench = Bench("keeplora", rank=6, energy=0.5)
    model = bench.begin(Stage(0, "task0"))
    method: Any = bench.method
    layer = layers(model)[0]
    known = method._basis(layer).double()
    free = torch.linalg.eigh(torch.eye(len(known), dtype=F64) - known @ known.T)[1][:, known.shape[1] :]
    method._earlier = {layer.name: free[:, 2:].float()}  # two directions are left
    method.prepare(model, Given([bench.batch([items("task0")[0]])]), alone)
    rows = method._chosen[layer.name]
    assert rows.shape[0] == 6 and not rows[2:].any()
    assert torch.allclose(rows[:2] @ rows[:2].T, torch.eye(2), atol=1e-5)
    assert float((rows @ method._basis(layer)).abs().max()) < 1e-5
    method.finish(model, Given([bench.batch([items("task0")[0]])]), alone)
    method.save(model, Stage(0, "task0"), tmp_path)
    assert json.loads((tmp_path / LIMITED).read_text()) == {layer.name: 2}


def test_too_large_a_rank_is_refused() -> None:
    bench = Bench("keeplora", rank=60, energy=0.5)
    model = bench.begin(Stage(0, "task0"))
    with pytest.raises(DeloError, match="rank is larger than what the protected directions"):
        bench.method.prepare(model, Given([bench.batch([items("task0")[0]])]), alone)
