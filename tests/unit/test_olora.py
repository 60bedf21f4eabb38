"""O-LoRA: sums and overlaps written out in float64, what is frozen, what the penalty does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from method_support import START
from torch import Tensor

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.olora import earlier_rows, overlap


def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def weight(layer: LowRankLayer, part: str, name: str) -> Tensor:
    found: Tensor = getattr(layer, f"lowrank_{part}")[name].weight
    return found.detach().double()


@pytest.mark.parametrize("norm", ["absolute", "squared"])
def test_the_overlap_is_over_all_pairs_of_rows(norm: str) -> None:
    random = torch.Generator().manual_seed(0)
    new, first, second = (torch.randn(3, 8, generator=random) for _ in range(3))
    total = 0.0
    for earlier in (first, second):
        for row in new.double():
            for other in earlier.double():
                product = float(row @ other)
                total += abs(product) if norm == "absolute" else product**2
    assert float(overlap(new, torch.cat([first, second]), norm)) == pytest.approx(total, rel=1e-5)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=random)).Q
    assert float(overlap(basis[:3], basis[3:], norm)) == pytest.approx(0, abs=1e-4)


def test_all_pairs_act_and_only_the_new_one_trains() -> None:
    told, bench = story("olora"), Bench("olora")
    model = bench.begin(told.stages[1])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".task1." in name for name in trained)
    for layer in layers(model):
        torch.nn.init.normal_(layer.lowrank_B["task1"].weight, std=0.1)  # type: ignore[arg-type]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers(model):
        layer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.name, (args[0], out)))
    with torch.no_grad():
        model(**bench.batch(items("task1")).inputs)
        for layer in layers(model):
            x, y = seen[layer.name]
            delta = sum(
                2.0 * x.double() @ weight(layer, "A", name).T @ weight(layer, "B", name).T
                for name in ("task0", "task1")
            )
            assert torch.allclose(y.double(), layer.base_layer(x).double() + delta, atol=1e-5), layer.name


def test_earlier_pairs_keep_their_bits() -> None:
    told = story("olora")
    after = {layer.name: layer for layer in layers(told.trained[1].model)}
    for layer in layers(told.trained[0].model):
        for part in "AB":
            assert torch.equal(weight(layer, part, "task0"), weight(after[layer.name], part, "task0"))


@pytest.mark.parametrize("norm", ["absolute", "squared"])
def test_the_penalty_is_the_overlap_of_every_linear_with_all_stages_before(norm: str) -> None:
    told, bench = story("olora"), Bench("olora", norm=norm)
    past = told.past(2)
    assert all(len(rows) == 2 * told.trained[0].model.peft_config["task0"].r for rows in earlier_rows(
        list(past.values())).values())  # fmt: skip
    model = bench.begin(Stage(2, "task2", (), past))
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = bench.method.penalties(values, START)["orthogonality"]
    expected = 0.0
    for layer in layers(model):
        for name in ("task0", "task1"):
            products = weight(layer, "A", "task2") @ weight(layer, "A", name).T
            expected += float(products.abs().sum() if norm == "absolute" else products.square().sum())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    assert len(layers(model)) == len(values) // 2
    gradients = torch.autograd.grad(found, list(values.values()), allow_unused=True)
    assert all((g is None) == ("lowrank_B" in n) for n, g in zip(values, gradients, strict=True))


def test_the_first_stage_has_no_penalty() -> None:
    told, bench = story("olora"), Bench("olora")
    model = bench.begin(told.stages[0])
    assert bench.method.penalties(dict(model.named_parameters()), START) == {}
    assert bench.method.footprint(bench.base()).every_task


def test_the_penalty_turns_the_new_rows_away(tmp_path: Path) -> None:
    told = story("olora")
    first, stage = told.stages
    past = {first.name: Past(told.trained[0].folder, first.tasks)}
    rows = earlier_rows(list(past.values()))

    def left(strength: float) -> float:
        bench = Bench("olora", strength=strength)
        done = bench.train(Stage(1, stage.name, stage.tasks, past, stage.seed), tmp_path / str(strength))
        found = {n.partition(".lowrank_A.")[0]: v for n, v in done.end.items() if ".lowrank_A." in n}
        return sum(float(overlap(v, rows[n], "absolute")) for n, v in found.items())

    assert left(10.0) < 0.9 * left(0.0)
