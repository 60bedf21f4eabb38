"""RegLoRA: its penalty against dense autograd in float64, its masks, what it keeps."""

from typing import Any

import pytest
import torch
from contract_support import Bench, story
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.own import TENSORS
from delo_llava.methods import reglora
from delo_llava.methods.base import Clock, Stage
from delo_llava.methods.reglora import IMPORTANT, important_mean, largest, packed, unpacked

CLOCK = Clock(0, 10, 10)


def drawn(
    d_out: int = 7, d_in: int = 13, rank: int = 3, masks: int = 2
) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    a, b = torch.randn(rank, d_in), torch.randn(d_out, rank)
    return a.requires_grad_(), b.requires_grad_(), [torch.rand(d_out, d_in) < 0.3 for _ in range(masks)]


@pytest.mark.parametrize("entries", [1, 40, 1 << 22])
def test_the_penalty_and_its_gradient_are_those_of_dense_autograd(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are made at once; an entry that two tasks have counts twice."""
    monkeypatch.setattr(reglora, "ENTRIES", entries)
    a, b, masks = drawn()
    found = 3 * important_mean(a, b, [packed(mask) for mask in masks])
    found.backward()
    one, two = (t.detach().double().requires_grad_() for t in (a, b))
    entries_of_all = torch.cat([(two @ one)[mask] for mask in masks])
    expected = 3 * entries_of_all.abs().mean()
    expected.backward()
    assert abs(float(found.detach()) - float(expected.detach())) < 1e-5
    assert a.grad is not None and torch.allclose(a.grad.double(), one.grad, atol=1e-5)
    assert b.grad is not None and torch.allclose(b.grad.double(), two.grad, atol=1e-5)
    union = (two @ one)[masks[0] | masks[1]].abs().mean() * 3
    assert abs(float(union.detach()) - float(expected.detach())) > 1e-3, "not the union's mean"


def test_a_penalty_on_nothing_is_nothing() -> None:
    a, b, _ = drawn()
    found = important_mean(a, b, [packed(torch.zeros(7, 13, dtype=torch.bool))])
    found.backward()
    assert found == 0 and a.grad is not None and not a.grad.any()


@pytest.mark.parametrize("width", [1, 8, 13])
def test_bits_come_back(width: int) -> None:
    mask = torch.rand(5, width, generator=torch.Generator().manual_seed(width)) < 0.5
    bits = packed(mask)
    assert bits.shape == (5, -(-width // 8)) and bits.dtype == torch.uint8
    assert torch.equal(unpacked(bits, width).bool(), mask)


def test_the_largest_are_the_largest_in_size() -> None:
    update = torch.tensor([[3.0, -5.0, 1.0], [0.5, 4.0, -2.0]])
    assert largest(update, 0.5).tolist() == [[True, True, False], [False, True, False]]
    assert largest(update, 1e-9).sum() == 1 and largest(update, 1.0).all()


def test_what_is_kept_are_the_largest_entries_of_the_stage_s_own_update() -> None:
    told = story("reglora")
    for done in told.trained:
        stored, bits = load_file(done.folder / TENSORS), load_file(done.folder / IMPORTANT)
        assert len(bits) == len(stored) / 2
        for name, mask in bits.items():
            key = f"base_model.model.{name}.lowrank_"
            update = (stored[f"{key}B.weight"] @ stored[f"{key}A.weight"]).abs()
            mine = unpacked(mask, update.shape[1]).bool()
            assert mine.sum() == round(0.02 * update.numel())
            assert update[mine].min() >= update[~mine].max()


def test_a_stage_is_held_where_earlier_ones_were_large() -> None:
    told = story("reglora")
    bench: Any = Bench("reglora")
    model = bench.begin(Stage(2, "now", past=told.past(2)))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lowrank_B.now" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = bench.method.penalties(values, CLOCK)["regularisation"]
    masks = [load_file(done.folder / IMPORTANT) for done in told.trained]
    expected = []
    for path, name in bench.method._layers.items():
        a, b = (values[f"{path}.lowrank_{side}.now.weight"].detach().double() for side in "AB")
        picked = [(b @ a)[unpacked(known[name], a.shape[1]).bool()] for known in masks]
        expected.append(torch.cat(picked).abs().mean())
    assert abs(float(found.detach()) - float(torch.stack(expected).mean())) < 1e-6
    assert bench.method.weights(CLOCK)["regularisation"] == 2500


def test_the_first_stage_and_no_strength_are_plain() -> None:
    bench = Bench("reglora")
    bench.begin(Stage(0, "now"))
    assert bench.method.penalties({}, CLOCK) == {}
    free = Bench("reglora", strength=0)
    free.begin(Stage(1, "now", past=story("reglora").past(1)))
    assert free.method.penalties({}, CLOCK) == {}


def test_a_bit_is_kept_for_every_weight() -> None:
    bench = Bench("reglora")
    told = bench.method.footprint(bench.base())
    bits = load_file(story("reglora").trained[0].folder / IMPORTANT)
    assert told.stored_bytes == sum(mask.numel() for mask in bits.values()) and told.every_task
