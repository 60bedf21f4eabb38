"""The layer against explicit ΔW in float64, one sample and one token at a time (specification 4, M5,
invariants 1, 2, 8)."""

import pytest
import torch
from torch import Tensor, nn

from delo_llava.adapters.carrier import Carrier, Route
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.plan import RoutePlan
from delo_llava.methods.delo.router import Selection

E, R, D_IN, D_OUT, ROWS, TOKENS = 5, 3, 12, 7, 4, 9
TASKS = ("first", "second")
SCALE = 1.7


def build(projector: bool = False, dtype: torch.dtype = torch.float64) -> DeloLayer:
    torch.manual_seed(0)
    layer = DeloLayer(nn.Linear(D_IN, D_OUT).to(dtype), Carrier(lambda inputs, queries: None), projector)
    for task in TASKS:
        layer.update_layer(task, DeloConfig(r=R, pool_size=E, alpha=SCALE * R))
        nn.init.normal_(layer.delo_B[task].weight)
    layer.delo_A.to(dtype), layer.delo_B.to(dtype)
    layer.slot = 0
    return layer.requires_grad_(True)


def selection(gated: bool, projector_slots: int = 0, dtype: torch.dtype = torch.float64) -> Selection:
    draw = torch.Generator().manual_seed(3)

    def pick(slots):
        return torch.stack(
            [torch.stack([torch.randperm(E, generator=draw)[:R] for _ in range(slots)]) for _ in range(ROWS)]
        )

    def gate(slots):
        return torch.rand(ROWS, slots, R, generator=draw, dtype=dtype) if gated else None

    slots, empty = projector_slots + 1, torch.zeros(ROWS, 2)
    return Selection(
        pick(slots), pick(slots), pick(1), pick(1), gate(slots), gate(1), empty, empty, empty, empty
    )


def plan_for(
    chosen: Selection,
    tasks: list[str],
    own: bool,
    projector_slots: int = 0,
    lengths: tuple[int, ...] = (),
    rows: tuple[int, ...] = (),
) -> tuple[RoutePlan, Tensor]:
    is_image = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.4
    queries = Queries(*(torch.zeros(ROWS, 2) for _ in range(3)))
    inputs = RouteInputs(
        torch.zeros(ROWS, TOKENS, dtype=torch.int64),
        is_image.byte(),
        torch.ones(ROWS, 2).bool(),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(lengths),
        None,
    )
    used = tuple(dict.fromkeys(tasks))
    plan = RoutePlan.build(
        chosen,
        inputs,
        tasks,
        used,
        queries,
        pool_size=E,
        text_start=E,
        projector_slots=projector_slots,
        own_tokens=own,
    )
    return plan, is_image


def delta(layer: DeloLayer, task: str, a: Tensor, b: Tensor, gate: Tensor | None, first: int) -> Tensor:
    """ΔW = s·Σ_j g_j b_j a_jᵀ of one sample and modality, written out."""
    total = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for j in range(R):
        weight = 1.0 if gate is None else gate[j].double()
        total += weight * torch.outer(
            layer.delo_B[task].weight[first + b[j]].double(), layer.delo_A[task].weight[first + a[j]].double()
        )
    return SCALE * total


def reference(
    layer: DeloLayer, x: Tensor, chosen: Selection, tasks: list[str], is_image: Tensor, own: bool
) -> Tensor:
    y = layer.base_layer(x).clone()
    for i in range(ROWS):
        gates = (
            (None, None) if chosen.image_gate is None else (chosen.image_gate[i, -1], chosen.text_gate[i, 0])
        )
        image = delta(layer, tasks[i], chosen.image_a[i, -1], chosen.image_b[i, -1], gates[0], 0)
        text = delta(layer, tasks[i], chosen.text_a[i, 0], chosen.text_b[i, 0], gates[1], E)
        for t in range(TOKENS):
            if not own or is_image[i, t]:
                y[i, t] += image @ x[i, t]
            if not own or not is_image[i, t]:
                y[i, t] += text @ x[i, t]
    return y


def apply(layer: DeloLayer, x: Tensor, plan: RoutePlan, offset: int = 0) -> Tensor:
    with layer.carrier.entered(Route(None, plan, offset)):  # type: ignore[arg-type]
        return layer(x)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "tasks", [["first"] * ROWS, ["second"] * ROWS, ["second", "first", "first", "second"]]
)
def test_equals_explicit_update(own: bool, gated: bool, tasks: list[str]) -> None:
    layer, chosen = build(), selection(gated)
    plan, is_image = plan_for(chosen, tasks, own)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    torch.testing.assert_close(
        apply(layer, x, plan), reference(layer, x, chosen, tasks, is_image, own), rtol=0, atol=1e-12
    )


def test_equals_pairing_matrix() -> None:
    """The gather-free form ((x Aᵀ) P) B with r nonzeros P[iA_j, iB_j] = g_j (M5)."""
    layer, chosen = build(), selection(True)
    plan, _ = plan_for(chosen, ["first"] * ROWS, own=False)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    y = layer.base_layer(x)
    for i in range(ROWS):
        for first, a, b, g in (
            (0, chosen.image_a, chosen.image_b, chosen.image_gate),
            (E, chosen.text_a, chosen.text_b, chosen.text_gate),
        ):
            pairing = torch.zeros(E, E, dtype=torch.float64)
            pairing[a[i, -1], b[i, -1]] = g[i, -1]
            y[i] += (
                SCALE
                * x[i]
                @ layer.delo_A["first"].weight[first : first + E].T
                @ pairing
                @ layer.delo_B["first"].weight[first : first + E]
            )
    torch.testing.assert_close(apply(layer, x, plan), y, rtol=0, atol=1e-12)


def test_pairing_is_by_rank() -> None:
    """Note 2: permuting the chosen B changes ΔW."""
    layer, chosen = build(), selection(False)
    other = chosen._replace(text_b=chosen.text_b.flip(-1))
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    outputs = [apply(layer, x, plan_for(c, ["first"] * ROWS, own=False)[0]) for c in (chosen, other)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 5, 3)])
def test_projector_packed_and_padded(lengths: tuple[int, ...]) -> None:
    """Rows of the projector are images, with T tokens each, packed or not; equal to one product per token."""
    layer, chosen = build(projector=True), selection(True, projector_slots=1)
    owners = (0, 2, 3)
    tasks = ["second", "first", "first", "second"]
    plan, _ = plan_for(chosen, tasks, own=True, projector_slots=1, lengths=lengths, rows=owners)
    x = torch.randn(sum(lengths), D_IN, dtype=torch.float64)
    expected = layer.base_layer(x).clone()
    token = 0
    for row, count in zip(owners, lengths, strict=True):
        update = delta(
            layer, tasks[row], chosen.image_a[row, 0], chosen.image_b[row, 0], chosen.image_gate[row, 0], 0
        )
        for _ in range(count):
            expected[token] += update @ x[token]
            token += 1
    torch.testing.assert_close(apply(layer, x, plan), expected, rtol=0, atol=1e-12)
    if len(set(lengths)) == 1:
        batched = x.view(3, lengths[0], D_IN)
        torch.testing.assert_close(
            apply(layer, batched, plan), expected.view(3, lengths[0], D_OUT), rtol=0, atol=1e-12
        )


def test_zero_b_and_zero_gates_leave_the_base_bit_equal() -> None:
    layer, chosen = build(dtype=torch.float32), selection(True, dtype=torch.float32)
    x = torch.randn(ROWS, TOKENS, D_IN)
    silent = chosen._replace(
        image_gate=torch.zeros_like(chosen.image_gate), text_gate=torch.zeros_like(chosen.text_gate)
    )
    assert torch.equal(apply(layer, x, plan_for(silent, ["first"] * ROWS, own=False)[0]), layer.base_layer(x))
    nn.init.zeros_(layer.delo_B["first"].weight)
    assert torch.equal(apply(layer, x, plan_for(chosen, ["first"] * ROWS, own=False)[0]), layer.base_layer(x))


def test_own_scope_gives_the_other_modality_nothing() -> None:
    """Invariant 8: text factors move no image token and the reverse; pools of an absent modality get a
    gradient
    of zero."""
    layer, chosen = build(), selection(False)
    plan, is_image = plan_for(chosen, ["first"] * ROWS, own=True)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    with torch.no_grad():
        layer.delo_B["first"].weight[E:] = 0  # text factors off
        moved = (apply(layer, x, plan) - layer.base_layer(x)).abs().sum(-1) > 0
    assert torch.equal(moved, is_image)
    plan.token_weight[..., :R] = 0  # no image token anywhere
    apply(layer, x, plan).sum().backward()
    assert layer.delo_A["first"].weight.grad[:E].abs().max() == 0
    assert layer.delo_B["first"].weight.grad[:E].abs().max() == 0
    assert layer.delo_B["first"].weight.grad[E:].abs().max() > 0


@pytest.mark.parametrize("start", [0, 3, 7])
def test_a_chunk_is_the_same_tokens_of_the_whole(start: int) -> None:
    """Prefill in chunks: token scope follows the position in the prompt."""
    layer, chosen = build(), selection(False)
    plan, _ = plan_for(chosen, ["first"] * ROWS, own=True)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    whole = apply(layer, x, plan)
    torch.testing.assert_close(
        apply(layer, x[:, start : start + 2], plan, start), whole[:, start : start + 2], rtol=0, atol=1e-12
    )


def test_decoding_uses_the_text_half_and_keeps_its_factors() -> None:
    layer, chosen = build(), selection(False)
    plan, _ = plan_for(chosen, ["first"] * ROWS, own=True)
    x = torch.randn(ROWS, 1, D_IN, dtype=torch.float64)
    expected = layer.base_layer(x) + torch.stack(
        [
            x[i] @ delta(layer, "first", chosen.text_a[i, 0], chosen.text_b[i, 0], None, E).T
            for i in range(ROWS)
        ]
    )
    with torch.no_grad():
        torch.testing.assert_close(apply(layer, x, plan, TOKENS), expected, rtol=0, atol=1e-12)
        nn.init.zeros_(layer.delo_B["first"].weight)  # the factors on the plan are already gathered
        torch.testing.assert_close(apply(layer, x, plan, TOKENS + 1), expected, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_explicit_update() -> None:
    layer, chosen = build(), selection(True)
    tasks = ["first"] * ROWS
    plan, is_image = plan_for(chosen, tasks, own=True)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    target = torch.randn(ROWS, TOKENS, D_OUT, dtype=torch.float64)
    weights = [layer.delo_A["first"].weight, layer.delo_B["first"].weight]
    ours = torch.autograd.grad((apply(layer, x, plan) * target).sum(), weights)
    naive = torch.autograd.grad((reference(layer, x, chosen, tasks, is_image, True) * target).sum(), weights)
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_types_are_kept_and_adapters_stay_fp32() -> None:
    layer = DeloLayer(nn.Linear(D_IN, D_OUT).bfloat16(), Carrier(lambda inputs, queries: None), False)
    layer.update_layer("first", DeloConfig(r=R, pool_size=E))
    layer.slot = 0
    layer.requires_grad_(True)
    plan, _ = plan_for(selection(True, dtype=torch.float32), ["first"] * ROWS, own=True)
    y = apply(layer, torch.randn(ROWS, TOKENS, D_IN).bfloat16(), plan)
    assert y.dtype == torch.bfloat16 and layer.delo_A["first"].weight.dtype == torch.float32
    y.float().sum().backward()
    assert layer.delo_B["first"].weight.grad.dtype == torch.float32


def test_no_plan_is_an_error() -> None:
    with pytest.raises(DeloError, match="how to route"):
        build()(torch.zeros(1, 1, D_IN, dtype=torch.float64))
