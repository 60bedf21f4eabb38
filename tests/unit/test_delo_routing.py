"""Queries, router and plan: what enters a route, and what must not (specification 5, invariants 4, 6, 7, 13;
traps T3–T5, T7, T12)."""

from dataclasses import replace

import pytest
import torch
from delo_support import (
    COMPLETE,
    NO_IMAGE,
    NO_TEXT,
    base,
    batch,
    changed,
    config,
    experts,
    run,
    same_routes,
)  # fmt: skip
from peft import get_peft_model
from torch.nn import functional as F

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.errors import DeloError
from delo_llava.features import queries
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods.delo.cross_modal import CrossModal, Routed
from delo_llava.methods.delo.plan import Packing
from delo_llava.methods.delo.router import Router, Selection, top_factors

ROWS = [COMPLETE, NO_IMAGE, NO_TEXT, COMPLETE]


@pytest.fixture(scope="module")
def model():
    return experts()


def plan_of(model, inputs, route):
    with torch.no_grad():
        return run(model, inputs, route)[1]


def routed(rows: int = 5, hidden: int = 16) -> Routed:
    draw = torch.Generator().manual_seed(1)
    return Routed(*(F.normalize(torch.randn(rows, hidden, generator=draw), dim=1) for _ in range(4)))


def router(**changes) -> Router:
    torch.manual_seed(2)
    return Router(**({"hidden": 16, "latent": 8, "slots": (3, 2), "pool_size": 6, "rank": 2} | changes))


def test_queries_are_masked_means(model) -> None:
    """Against a mean written out token by token, in float64."""
    inputs, route = batch(model, ROWS, pad=3)
    found = frozen_queries(model, route, inputs)
    table = model.get_input_embeddings().weight.double()
    with torch.no_grad(), model.disable_adapter():
        features = torch.cat(
            list(model.get_base_model().get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
        ).double()
    image_of = {row: i for i, row in enumerate(route.image_rows.tolist())}
    for i in range(len(ROWS)):
        for view, kind in (("text", 2), ("instruction", 3)):
            tokens = [
                table[t]
                for t, k in zip(inputs["input_ids"][i].tolist(), route.segments[i].tolist(), strict=True)
                if k == kind
            ]
            expected = (
                F.normalize(torch.stack(tokens).mean(0), dim=0)
                if tokens
                else torch.zeros(64, dtype=torch.float64)
            )
            torch.testing.assert_close(getattr(found, view)[i].double(), expected, rtol=0, atol=1e-6)
        own = features[image_of[i] * 16 : image_of[i] * 16 + 16].mean(0) if i in image_of else None
        expected = torch.zeros(64, dtype=torch.float64) if own is None else F.normalize(own, dim=0)
        torch.testing.assert_close(found.image[i].double(), expected, rtol=0, atol=1e-6)


def test_queries_before_and_during_a_forward_are_the_same(model) -> None:
    inputs, route = batch(model, ROWS)
    for early, late in zip(
        frozen_queries(model, route, inputs), plan_of(model, inputs, route).queries, strict=True
    ):
        assert torch.equal(early, late)


def test_image_mean_over_several_images_of_a_row() -> None:
    features = torch.randn(7, 4)
    found = queries.image_mean(features, [2, 3, 2], torch.tensor([1, 0, 1]), 3)
    torch.testing.assert_close(found[0], F.normalize(features[2:5].mean(0), dim=0))
    torch.testing.assert_close(found[1], F.normalize(torch.cat([features[:2], features[5:]]).mean(0), dim=0))
    assert found[2].abs().sum() == 0


def test_routes_ignore_padding(model) -> None:
    plans = [
        plan_of(model, *batch(model, ROWS, pad=pad, left=left))
        for pad, left in ((0, False), (9, False), (9, True))
    ]
    assert same_routes(plans[0], plans[1]) and same_routes(plans[0], plans[2])


def test_routes_ignore_batch_composition_and_order(model) -> None:
    inputs, route = batch(model, ROWS)
    whole = plan_of(model, inputs, route)
    order = [2, 0, 3]
    images = {row: i for i, row in enumerate(route.image_rows.tolist())}
    parts = [images[i] for i in order if i in images]
    picked = {
        "input_ids": inputs["input_ids"][order],
        "attention_mask": inputs["attention_mask"][order],
        "pixel_values": inputs["pixel_values"][parts],
    }
    rows = torch.tensor([k for k, i in enumerate(order) if i in images])
    part = RouteInputs(
        picked["input_ids"],
        route.segments[order],
        route.presence[order],
        rows,
        route.image_units[: len(parts)],
        None,
    )
    assert same_routes(plan_of(model, picked, part), whole, order)


def test_routes_ignore_answers_and_template(model) -> None:
    inputs, route = batch(model, ROWS)
    other = inputs["input_ids"].clone()
    outside = (route.segments == 0) & (inputs["attention_mask"] == 1)
    other[outside] = 269  # bos and answer
    assert outside.sum() >= 4 * len(ROWS)
    changed_plan = plan_of(model, inputs | {"input_ids": other}, changed(route, input_ids=other))
    assert same_routes(plan_of(model, inputs, route), changed_plan)


def test_routes_depend_on_context_and_image(model) -> None:
    """The opposite: a test that could not fail would show nothing."""
    first, second = (plan_of(model, *batch(model, ROWS, seed=s)) for s in (0, 1))
    assert not torch.equal(first.selection.text_a, second.selection.text_a)
    assert not torch.equal(first.selection.image_a, second.selection.image_a)
    assert len({tuple(r.flatten().tolist()) for r in first.selection.image_a}) > 1, "samples differ"


def test_missing_modality_routes_by_the_other(model) -> None:
    """Invariant 6, both directions, with the identity map: the route equals that of the substituted query."""
    inputs, route = batch(model, ROWS)
    plan = plan_of(model, inputs, route)
    q = plan.queries
    choose = model.base_model.delo_router["one"]
    by_text, by_image = Routed(q.text, q.text, q.text, q.text), Routed(q.image, q.image, q.image, q.image)
    with torch.no_grad():
        from_text, from_image = Selection(*choose(by_text)), Selection(*choose(by_image))
    assert torch.equal(plan.selection.image_a[1], from_text.image_a[1]) and torch.equal(
        plan.selection.image_b[1], from_text.image_b[1]
    )
    assert torch.equal(plan.selection.text_a[2], from_image.text_a[2]) and torch.equal(
        plan.selection.text_b[2], from_image.text_b[2]
    )


def test_dummy_content_does_not_route(model) -> None:
    """A dummy image is fed, the flag says missing: whatever it shows, routes and queries for routing stay
    (T4,
    T5, 13)."""
    inputs, route = batch(model, [COMPLETE, COMPLETE])
    presence = torch.tensor([[False, True], [True, False]])
    segments = route.segments.clone()
    other_pixels, other_ids = inputs["pixel_values"].clone(), inputs["input_ids"].clone()
    other_pixels[0] = 1.0  # row 0: the image is a dummy
    other_ids[1, 17:22] = 300  # row 1: the context is a dummy
    one = plan_of(model, inputs, changed(route, presence=presence, segments=segments))
    two = plan_of(
        model,
        inputs | {"pixel_values": other_pixels, "input_ids": other_ids},
        changed(route, presence=presence, input_ids=other_ids),
    )
    assert same_routes(one, two)
    assert not same_routes(plan_of(model, inputs, route), two)


def test_neither_modality_routes_by_the_instruction() -> None:
    q = Queries(*(F.normalize(torch.randn(3, 8), dim=1) for _ in range(3)))
    out = CrossModal("identity", 8, 2)(q, torch.tensor([[True, True], [False, False], [False, True]]))
    assert torch.equal(out.image[1], q.instruction[1]) and torch.equal(out.text[1], q.instruction[1])
    assert torch.equal(out.image[0], q.image[0]) and torch.equal(out.text[2], q.text[2])
    torch.testing.assert_close(out.image[2], q.text[2])


def test_top_factors_are_sorted_and_stable() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_factors(scores, 3).tolist() == [[1, 2, 4], [0, 1, 2]]


def test_a_query_that_moves_changes_only_choices_between_close_scores() -> None:
    """The bound of docs/delo.md: e gives way to f only if s_e − s_f ≤ ‖(h_e − h_f)·W‖·‖δ‖."""
    r, draw = router(pool_size=24, slots=(40, 2)), torch.Generator().manual_seed(3)
    q = routed(rows=16)
    moved = F.normalize(q.image + 2**-9 * torch.randn(q.image.shape, generator=draw), dim=1)
    delta = (moved - q.image).double().norm(dim=1)
    before, after = (Selection(*r(each)).image_a for each in (q, q._replace(image=moved)))
    head = r.image_head.double().view(40, 2, 24, 8)[:, 0] @ r.image_down.double()
    scores = torch.einsum("sed,nd->nse", head, q.image.double())
    flips = 0
    for n, s in (before.sort(-1).values != after.sort(-1).values).any(-1).nonzero().tolist():
        old, new = set(before[n, s].tolist()), set(after[n, s].tolist())
        flips += 1
        for e in old - new:
            for f in new - old:
                assert scores[n, s, e] - scores[n, s, f] <= (head[s, e] - head[s, f]).norm() * delta[n]
    assert 0 < flips < 40 * 16 / 10


def test_in_half_precision_text_routes_alone_as_in_a_batch_and_pictures_nearly_so() -> None:
    torch.manual_seed(0)
    half = get_peft_model(base(dtype=torch.bfloat16), config(), adapter_name="one")
    whole_inputs, whole = batch(half, [COMPLETE] * 8)
    whole_inputs["pixel_values"] = whole_inputs["pixel_values"].bfloat16()
    queries_whole = frozen_queries(half, whole, whole_inputs)
    for i in range(8):
        one = {name: value[i : i + 1] for name, value in whole_inputs.items()}
        part = changed(
            whole, input_ids=whole.input_ids[i : i + 1], segments=whole.segments[i : i + 1],
            presence=whole.presence[i : i + 1], image_rows=torch.tensor([0]), image_units=torch.tensor([1]),
        )  # fmt: skip
        alone = frozen_queries(half, part, one)
        assert torch.allclose(alone.text, queries_whole.text[i : i + 1], rtol=0, atol=1e-7)
        assert torch.allclose(alone.instruction, queries_whole.instruction[i : i + 1], rtol=0, atol=1e-7)
        assert (alone.image - queries_whole.image[i]).norm() < 2**-7


@pytest.mark.parametrize("conditional", ["table", "none", "factor"])
def test_selection_against_the_equations(conditional: str) -> None:
    """Scores of A and B of every slot, written out in float64 (section 4)."""
    widths = ([5, 7, 4], [7, 4])
    r = router(conditional=conditional, widths=widths)
    pools = tuple([torch.randn(6, w) for w in group] for group in widths)
    q = routed()
    chosen = Selection(*r(q, pools))
    for modality, query, a, b, group in (
        ("image", q.image, chosen.image_a, chosen.image_b, pools[0]),
        ("text", q.text, chosen.text_a, chosen.text_b, pools[1]),
    ):
        p = {
            name.removeprefix(f"{modality}_"): value.double()
            for name, value in r.named_parameters()
            if name.startswith(modality)
        }
        head, bias = p["head"].view(len(group), 2, 6, 8), p["bias"].view(len(group), 2, 6)
        for i in range(5):
            z = p["down"] @ query[i].double()
            for s, pool in enumerate(group):
                best = (head[s, 0] @ z + bias[s, 0]).argsort(descending=True, stable=True)[:2]
                scores = head[s, 1] @ z + bias[s, 1]
                for j, e in enumerate(best):
                    if conditional == "table":
                        scores = scores + p["table"][s, j, e]
                    elif conditional == "factor":
                        scores = scores + p[f"factor{s}"][j].T @ pool[e].double() / 2**0.5
                assert a[i, s].tolist() == best.tolist()
                assert b[i, s].tolist() == scores.argsort(descending=True, stable=True)[:2].tolist()


def test_straight_through_gate_is_exactly_one_and_carries_the_softmax_gradient() -> None:
    r = router()
    scores = torch.randn(5, 3, 6, requires_grad=True)
    chosen = top_factors(scores.detach(), 2)
    gates = r.gates(scores, chosen)
    assert torch.equal(gates, torch.ones_like(gates))
    weight = torch.randn_like(gates)
    (ours,) = torch.autograd.grad((gates * weight).sum(), scores)
    (soft,) = torch.autograd.grad((scores.softmax(-1).gather(-1, chosen) * weight).sum(), scores)
    torch.testing.assert_close(ours, soft)
    with torch.no_grad():
        assert r.gates(scores, chosen) is None, "in inference a gate of one is left out"


def test_other_gates() -> None:
    scores, chosen = torch.randn(5, 3, 6), torch.tensor([1, 4]).expand(5, 3, 2)
    assert router(gate="none").gates(scores, chosen) is None
    soft = router(gate="softmax", temperature=0.5).gates(scores, chosen)
    torch.testing.assert_close(soft, 2 * (scores[..., [1, 4]] / 0.5).softmax(-1))
    torch.testing.assert_close(soft.mean(-1), torch.ones(5, 3))


def test_plan_rows_can_be_reordered(model) -> None:
    inputs, route = batch(model, ROWS)
    plan = plan_of(model, inputs, route)
    rows = torch.tensor([3, 3, 0])
    moved = plan.index_select(rows)
    assert same_routes(moved, plan, rows) and moved.tasks == ["one"] * 3 and not moved.cache
    for old, new in zip(plan.language.b, moved.language.b, strict=True):
        assert torch.equal(old[rows], new)
    assert torch.equal(moved.token_weight, plan.token_weight[rows])


def test_packing_round_trip() -> None:
    for lengths in ([3, 3], [2, 5, 1]):
        packing = Packing.of(lengths, torch.device("cpu"))
        x = torch.randn(sum(lengths), 4)
        assert torch.equal(packing.unpad(packing.pad(x)), x)
        assert packing.pad(x).shape == (len(lengths), max(lengths), 4)


def test_inputs_that_disagree_are_refused(model) -> None:
    inputs, route = batch(model, ROWS)
    with pytest.raises(DeloError, match="disagree on the batch"):
        changed(route, segments=route.segments[:, 1:])
    with pytest.raises(DeloError, match="one task per row"):
        changed(route, tasks=["one"])
    with pytest.raises(DeloError, match="row and a number"):
        changed(route, image_units=route.image_units[1:])
    with pytest.raises(DeloError, match="does not add up"):
        plan_of(model, inputs, changed(route, image_units=route.image_units * 0))
    with pytest.raises(DeloError, match="No experts for this task"):
        plan_of(model, inputs, changed(route, tasks="two"))
    without = {k: v for k, v in inputs.items() if k != "pixel_values"}
    text_only = without | {"input_ids": inputs["input_ids"].masked_fill(route.segments == 1, 300)}
    with pytest.raises(DeloError, match="disagree on the images"):
        plan_of(model, text_only, route)
    none = replace(route, image_rows=route.image_rows[:0], image_units=route.image_units[:0])
    with pytest.raises(DeloError, match="marked as having an image"):
        plan_of(model, text_only, none)
    with pytest.raises(DeloError, match="number of rows"):
        plan_of(model, {k: v[:2] for k, v in inputs.items()}, route)
