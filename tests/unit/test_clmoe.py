"""CL-MoE: both routers' mixture written out in float64, the task router as a mean of the instance's, and the
momentum by an expert's role."""

from typing import Any

import pytest
import torch
from contract_support import Bench, examples, items, story
from method_support import START, Given, alone, seen_by_layers
from torch import Tensor

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.data.segments import SEGMENT_OTHER
from delo_llava.errors import DeloError
from delo_llava.methods.clmoe import shares, task_weights

N, K = 4, 2
ROWS = [*items("task0"), *items("task1")[:2]]


def instance(layer: Any, prompt: Tensor) -> Tensor:
    """G^I of one row from its prompt's inputs, in float64."""
    weights = (layer.lowrank_R["default"].weight.double() @ prompt.double().mean(0)).softmax(0)
    kept = weights.topk(K).indices
    found = torch.zeros_like(weights)
    found[kept] = weights[kept] / weights[kept].sum()
    return found


def update(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """s·Σ_i w_i B_i A_i x for x S×d."""
    a, b = (getattr(layer, f"lowrank_{side}")["default"].weight.double() for side in "AB")
    size = len(a) // N
    blocks = [slice(i * size, (i + 1) * size) for i in range(N)]
    return sum(layer.scale["default"] * weights[i] * x @ a[k].T @ b[:, k].T for i, k in enumerate(blocks))  # type: ignore[return-value]


@pytest.mark.parametrize("beta", [0.5, 1.0, 0.0])
def test_every_linear_is_the_mixture_of_both_routers(beta: float) -> None:
    """β = 1 is the instance's alone (a mixture of experts), β = 0 the task's."""
    told = story("clmoe")
    bench = Bench("clmoe", beta=beta, top_k=K)
    model, method = bench.loaded(told.past(2)), bench.method
    batch = bench.batch(ROWS)
    plan, seen = seen_by_layers(model, method, batch)
    images, other = batch.image_rows.tolist(), 0
    tables: Any = method
    for layer, x, y in seen.values():
        for n in range(len(x)):
            row = images[n] if layer.projector else n
            own = instance(layer, x[n] if layer.projector else x[n][batch.segments[n] != SEGMENT_OTHER])
            task = int(plan.values["tasks"][row].argmax())
            of_task = tables._earlier[task][tables._names.index(layer.name)].double()
            expected = update(layer, x[n].double(), beta * own + (1 - beta) * of_task)
            base = layer.base_layer(x[n]).double()
            torch.testing.assert_close(y[n].double(), base + expected, rtol=0, atol=2e-5)
            other += not torch.allclose(
                y[n].double(), base + update(layer, x[n].double(), of_task.flip(0)), atol=2e-5
            )
    assert other


def test_the_task_of_a_row_is_the_nearest_and_without_evidence_all_count_alike() -> None:
    told = story("clmoe")
    bench = Bench("clmoe", views=("image",))
    model = bench.loaded(told.past(2))
    method: Any = bench.method
    batch = bench.batch(ROWS)
    plan, _ = seen_by_layers(model, method, batch)
    queries = frozen_queries(model, method.inputs(batch), batch.inputs)
    means = torch.stack([method._anchors.tasks[t].means()[0] for t in ("task0", "task1")])
    for row, shown in enumerate(batch.presence[:, 0].tolist()):
        if shown:
            q = queries.image[row].double()
            nearest = int((means @ q / means.norm(dim=1)).argmax())
            assert plan.values["tasks"][row].tolist() == [float(i == nearest) for i in range(2)]
        else:
            assert plan.values["tasks"][row].tolist() == [0.5, 0.5]


def test_the_task_router_is_the_mean_of_what_the_instance_router_gave() -> None:
    """Counted once a micro-batch: over rows, and in the projector over real images."""
    bench = Bench("clmoe", top_k=K)
    model = bench.begin(bench.stages()[0])
    method: Any = bench.method
    expected = torch.zeros_like(method._sums)
    for start in (0, 4):
        batch = bench.batch([examples("task0")[i] for i in range(start, start + 4)])
        method.loss_sums(model, batch)["answer"].backward()
        method.after_backward(model, batch, START)
        _, seen = seen_by_layers(model, method, batch)
        method._seen = {}
        for at, name in enumerate(method._names):
            layer, x, _ = seen[name]
            for n in range(len(x)):
                prompt = x[n] if layer.projector else x[n][batch.segments[n] != SEGMENT_OTHER]
                expected[at] += torch.cat([instance(layer, prompt), torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(method._sums, expected, rtol=0, atol=1e-5)
    assert sorted(set(method._sums[:, -1].tolist())) == [6.0, 8.0], "images, rows"
    torch.testing.assert_close(task_weights(method._sums).sum(1), torch.ones(len(expected)))
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    again: Any = Bench("clmoe").method
    again.load_state_dict(model, state)
    assert torch.equal(again._sums, method._sums)


def test_how_much_of_the_past_stays_is_by_role() -> None:
    now = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    earlier = [torch.tensor([[0.6, 0.0, 0.0, 0.4], [0.5, 0.5, 0.0, 0.0]])]
    assert shares(now, earlier, 2, 0.7).tolist() == [
        pytest.approx([0.7, 0.3, 1.0, 1.0]), [1.0] * 4,
    ]  # fmt: skip
    more = [*earlier, torch.tensor([[0.0, 0.9, 0.1, 0.0]] * 2)]
    assert shares(now, more, 2, 0.7)[0].tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0])


def test_momentum_mixes_what_was_trained_with_what_was_there() -> None:
    """θ_t = λθ + (1 − λ)φ block by block; λ = 1 leaves an expert unchanged to the bit."""
    told = story("clmoe")
    bench = Bench("clmoe", top_k=K)
    model = bench.method.begin(bench.base(), told.stages[1])
    method: Any = bench.method
    pairs = {n: p for n, p in model.named_parameters() if "lowrank_A" in n or "lowrank_B" in n}
    old = {n: p.detach().clone() for n, p in pairs.items()}
    with torch.no_grad():
        for parameter in pairs.values():
            parameter.add_(torch.randn_like(parameter))
    new = {n: p.detach().clone() for n, p in pairs.items()}
    method._sums = torch.rand(method._sums.shape, dtype=torch.float64)
    share = shares(task_weights(method._sums), method._earlier, K, 0.7)
    method.finish(model, Given(), alone)
    assert {0.7, 1.0} <= {round(v, 4) for v in share.flatten().tolist()}
    for at, name in enumerate(method._names):
        for side, axis in (("A", 0), ("B", 1)):
            key = next(n for n in pairs if f"{name}.lowrank_{side}." in n)
            was, trained, is_now = (t[key].unflatten(axis, (N, -1)) for t in (old, new, pairs))
            for e in range(N):
                one = share[at, e]
                a, b, c = (t.select(axis, e) for t in (was, trained, is_now))
                torch.testing.assert_close(c, one * a + (1 - one) * b, rtol=0, atol=1e-6)
                assert one != 1.0 or torch.equal(c, a)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DeloError, match="multiple of the number of experts"):
        Bench("clmoe", rank=6, experts=4)
    with pytest.raises(DeloError, match="cannot act"):
        Bench("clmoe", rank=8, experts=4, top_k=5)
