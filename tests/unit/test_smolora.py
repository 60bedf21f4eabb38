"""SMoLoRA: every linear against the two experts and their weights written out in float64; gates that learn,
and those that do not; decisions that are a sample's own and hold for its whole answer."""

from typing import Any

import pytest
import torch
from contract_support import Bench, examples, items, story
from method_support import seen_by_layers
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from delo_llava.adapters.carrier import routing
from delo_llava.adapters.lowrank import LowRankLayer, RowPlan
from delo_llava.data.segments import SEGMENT_OTHER
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods._instances import at_prefill, instance_means

E = 2
ROWS = [*items("task0"), items("task1")[1]]


def trained() -> tuple[Bench, Any]:
    """The model after both tasks."""
    told = story("smolora")
    return told.bench, told.bench.loaded(told.past(2))


def written_out(layer: LowRankLayer, x: Tensor, mean: Tensor, words: Tensor) -> Tensor:
    """One row's output: x S×d, its mean over the prompt, its instruction's query."""
    a, b = (getattr(layer, f"lowrank_{side}")["default"].weight.double() for side in "AB")
    maps: Any = layer.lowrank_H["default"]
    head = {name: maps[name].weight.double() for name in maps}
    size = len(a) // (2 * E)
    i = int((head["visual"] @ mean).argmax())
    j = E + int((head["instruction"] @ words).argmax())
    u, v = (
        layer.scale["default"] * x @ a[k * size : (k + 1) * size].T @ b[:, k * size : (k + 1) * size].T
        for k in (i, j)
    )
    weights = torch.stack([u @ head["fuse_visual"][0], v @ head["fuse_instruction"][0]], -1).softmax(-1)
    return layer.base_layer(x.float()).double() + weights[:, :1] * u + weights[:, 1:] * v


def test_every_linear_is_what_the_paper_writes() -> None:
    bench, model = trained()
    batch = bench.batch(ROWS)
    plan, seen = seen_by_layers(model, bench.method, batch)
    images = batch.image_rows.tolist()
    chosen = set()
    assert {name.rpartition(".")[2] for name in seen} == {
        "gate_proj", "up_proj", "down_proj", "linear_1", "linear_2",
    }  # fmt: skip
    for layer, x, y in seen.values():
        for n in range(len(x)):
            row = images[n] if layer.projector else n
            prompt = x[n] if layer.projector else x[n][batch.segments[n] != SEGMENT_OTHER]
            mean = prompt.double().mean(0)
            words = plan.values["instruction"][row].double()
            chosen.add(
                (layer.name, int((layer.lowrank_H["default"]["visual"].weight.double() @ mean).argmax()))
            )
            expected = written_out(layer, x[n].double(), mean, words)
            torch.testing.assert_close(y[n].double(), expected, rtol=0, atol=2e-5)
    assert len(chosen) > len(seen), "some layer sends samples to different experts"


@pytest.mark.parametrize("gate", ["ste", "none"])
def test_gates_learn_and_as_released_they_do_not(gate: str) -> None:
    """Trap T1: an argmax alone gives them no gradient; the straight-through one changes no value."""
    bench = Bench("smolora", gate=gate)
    told = story("smolora")
    model = bench.method.begin(bench.base(), told.stages[1])  # goes on from a stage, so B is not zero
    batch = bench.batch([examples("task1")[i] for i in range(4)])
    bench.method.loss_sums(model, batch)["answer"].backward()
    gates = {n: p for n, p in model.named_parameters() if ".visual." in n or ".instruction." in n}
    assert len(gates) == 2 * 8
    learns = [n for n, p in gates.items() if p.grad is not None and bool((p.grad != 0).any())]
    assert len(learns) == (len(gates) if gate == "ste" else 0)
    assert all(p.requires_grad == (gate == "ste") for p in gates.values())
    other = Bench("smolora", gate="ste" if gate == "none" else "none")
    twin = other.method.begin(other.base(), told.stages[1])
    with torch.no_grad():
        assert torch.equal(
            *(b.method.loss_sums(m, batch)["answer"] for b, m in ((bench, model), (other, twin)))
        )


def test_what_a_prefill_decides_holds_for_every_token_that_follows() -> None:
    """Trap T3: of a whole sequence at once, and of its prompt and then token by token, the answers agree."""
    bench, model = trained()
    prompt = bench.batch([items("task0")[0]], generation=True)
    with torch.no_grad(), bench.method.answering(model, prompt, None) as given:
        ids = model.generate(**given.inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    length = prompt.inputs["input_ids"].shape[1]
    batch = {**prompt.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    segments = F.pad(prompt.segments, (0, ids.shape[1] - length))
    method: Any = bench.method
    route = method.inputs(prompt)
    whole = RouteInputs(
        ids, segments, route.presence, route.image_rows, route.image_units, None, queries=route.queries
    )
    with torch.no_grad(), routing(model, whole):
        logits = model(**batch).logits
    assert torch.equal(logits[:, length - 1 : -1].argmax(-1), ids[:, length:])


def test_means_are_of_the_prompt_alone_and_kept_after_it() -> None:
    layer: Any = LowRankLayer(torch.nn.Linear(3, 3), None, False)
    layer.name = "somewhere"
    segments = torch.tensor([[0, 1, 1, 3, 0], [0, 0, 2, 3, 0]], dtype=torch.uint8)
    inputs = RouteInputs(
        torch.zeros(2, 5, dtype=torch.int64), segments, torch.ones(2, 2, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), None, expand=2,
    )  # fmt: skip
    plan = RowPlan({"instruction": torch.zeros(4, 3)}, inputs)
    x = torch.randn(4, 5, 3)
    found = instance_means(layer, x, plan)
    for row in range(4):  # beams repeat rows
        torch.testing.assert_close(found[row], x[row][segments[row // 2] != 0].mean(0))

    class At:
        offset = 0

    layer.carrier = At()
    with torch.no_grad():
        first = at_prefill(layer, plan, lambda: torch.ones(1))
    At.offset = 5
    assert at_prefill(layer, plan, lambda: torch.zeros(1)) is first
    layer.projector = True
    packed = RowPlan(
        {"instruction": torch.zeros(2, 3)},
        RouteInputs(
            inputs.input_ids, segments, inputs.presence, torch.tensor([1, 0]), torch.tensor([1, 3]), None
        ),
    )
    tokens = torch.randn(4, 3)
    torch.testing.assert_close(
        instance_means(layer, tokens, packed), torch.stack([tokens[0], tokens[1:].mean(0)])
    )


def test_ranks_and_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DeloError, match="multiple of the number of experts of both kinds"):
        Bench("smolora", rank=6, experts=2)
    with pytest.raises(ValidationError):
        Bench("smolora", experts=1)


def test_a_matched_rank_counts_gates_and_weights() -> None:
    """Nearest to DeLo's parameters among ranks that all experts can share."""
    bench = Bench("smolora", rank="match")
    delo = Bench("delo")
    wanted = delo.method.footprint(delo.base()).parameters
    own = bench.method.footprint(bench.base()).parameters
    method: Any = bench.method
    step = method.multiple * sum(map(sum, method.placed(bench.base()).values()))
    assert abs(own - wanted) <= step / 2 or method.config(bench.base()).r == method.multiple
