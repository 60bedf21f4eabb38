"""The output head sees the answers' positions alone, and losses are what they are over all positions."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import KINDS, batch, experts, items, loaded
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.adapters.carrier import routing
from delo_llava.data.collate import IGNORE, Batch
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods import _answers
from delo_llava.methods._answers import answer_logits, answer_loss_sum, at_answers

#: A row with a picture and one without.
PAIR = [items()[1], items()[4]]


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Over all positions of B×S×V, those that are not trained ignored."""
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def by_hand(logits: Tensor, labels: Tensor) -> float:
    """The same number by number, in float64."""
    total = 0.0
    for row, wanted in zip(logits.double(), labels.tolist(), strict=True):
        for place, token in enumerate(wanted[1:]):
            if token != IGNORE:
                said = row[place].tolist()
                top = max(said)
                total += top + math.log(sum(math.exp(v - top) for v in said)) - said[token]
    return total


def loss_of(model: Any, given: Batch, alone: bool) -> Tensor:
    """Of a routed forward, with the head at the answers alone or everywhere."""
    assert given.labels is not None
    with routing(model, RouteInputs.from_batch(given)):
        if alone:
            return answer_loss_sum(answer_logits(model, given), given.labels)
        return plain_loss(model(**given.inputs).logits, given.labels)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_s_head_sees_the_answers_alone(kind: str) -> None:
    """Loss and gradients as of the whole head; the loss as of a float64 model's, number by number."""
    model, given = experts(kind).train(), batch(kind, PAIR)
    assert given.labels is not None
    trained = int((given.labels[:, 1:] != IGNORE).sum())
    assert 0 < trained < given.labels.numel() / 4
    seen: list[int] = []
    head = model.get_output_embeddings()
    watch = head.register_forward_hook(lambda m, a, out: seen.append(out.shape[:-1].numel()))
    found = {}
    for alone in (True, False):
        loss = loss_of(model, given, alone)
        loss.backward()
        found[alone] = float(loss.detach()), gradients(model)
    watch.remove()
    assert seen == [trained, given.labels.numel()]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert found[True][1].keys() == found[False][1].keys()
    for name, gradient in found[False][1].items():
        atol = 1e-6 * float(gradient.abs().max())
        assert torch.allclose(found[True][1][name], gradient, rtol=1e-4, atol=max(atol, 1e-9)), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_exact_numbers(kind: str) -> None:
    _, base, _ = loaded(kind)
    given = batch(kind, PAIR)
    exact = copy.deepcopy(base).double()
    exact.set_experts_implementation("eager")  # a mixture's fused products know no float64
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in given.inputs.items()}
    assert given.labels is not None
    with torch.no_grad():
        expected = by_hand(exact(**inputs).logits, given.labels)
        found = answer_loss_sum(answer_logits(base, given), given.labels)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_sum_is_that_over_all_positions_to_the_last_bit() -> None:
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(3, 90, 40, generator=draw)
        labels = torch.randint(40, (3, 90), generator=draw)
        labels[torch.rand(3, 90, generator=draw) < 0.8] = IGNORE
        whole, alone = (logits.clone().requires_grad_() for _ in range(2))
        losses = plain_loss(whole, labels), answer_loss_sum(at_answers(alone, labels), labels)
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        assert whole.grad is not None and alone.grad is not None
        assert torch.equal(whole.grad, alone.grad)


def test_half_precision_stays_in_the_head_and_the_loss_is_fp32() -> None:
    model, given = experts("llava").to(torch.bfloat16), batch("llava")
    given = replace(given, inputs={**given.inputs, "pixel_values": given.inputs["pixel_values"].bfloat16()})
    with routing(model, RouteInputs.from_batch(given)):
        logits = answer_logits(model, given)
    assert logits.dtype == torch.bfloat16 and given.labels is not None
    loss = answer_loss_sum(logits, given.labels)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(loss_of(model, given, alone=False).detach()), rel=1e-2)


def test_where_nothing_is_trained_loss_and_gradients_are_zero() -> None:
    model, given = experts("qwen2_5_vl").train(), batch("qwen2_5_vl")
    assert given.labels is not None
    given = replace(given, labels=torch.full_like(given.labels, IGNORE))
    loss = loss_of(model, given, alone=True)
    loss.backward()
    found = gradients(model)
    assert loss.item() == 0.0 and found and not any(bool(g.any()) for g in found.values())


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model, given = experts("llava").train(), batch("llava")
    loss_of(model, given, alone=True).backward()
    kept = gradients(model)
    model.get_base_model().gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": model.base_model.carrier.checkpoint_contexts}
    )
    loss_of(model, given, alone=True).backward()
    again = gradients(model)
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)


class Heads(nn.Module):
    """A model whose head is used otherwise than expected."""

    def __init__(self, calls: int, length: int) -> None:
        super().__init__()
        self.head, self.calls, self.length = nn.Linear(4, 9), calls, length

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **inputs: Tensor) -> Any:
        states = torch.zeros(len(inputs["input_ids"]), self.length, 4)
        for _ in range(self.calls):
            logits = self.head(states)
        return type("Output", (), {"logits": logits if self.calls else states})()


@pytest.mark.parametrize(("calls", "length"), [(0, 0), (2, 0), (1, 3)])
def test_a_head_that_is_used_otherwise_is_told_and_left_alone(calls: int, length: int) -> None:
    given = batch("llava")
    assert given.labels is not None
    model = Heads(calls, given.labels.shape[1] + length)
    with pytest.raises(DeloError, match="does not see every position once"):
        answer_logits(model, given)
    assert not model.head._forward_pre_hooks
    assert answer_logits(Heads(1, given.labels.shape[1]), given).shape[1] == 9


def test_no_method_s_loss_asks_for_the_logits_of_every_position() -> None:
    """In the methods' code only a choice, which reads one position without gradient, does."""
    folder = Path(_answers.__file__).parent
    asking = {file.name for file in folder.rglob("*.py") if "inputs).logits" in file.read_text()}
    assert asking == {"_answers.py", "mrlora.py"}
