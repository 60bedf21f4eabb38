"""RebQ: reconstruction and prefixes against loops in float64, and the traps of the released code."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_support import Bench, items, records, story
from prompts_support import WIDTH, Built, cosine, inputs, queries, unit
from torch import Tensor

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.data.examples import shown
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods._prompts import prompts_of
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.rebq import reconstructed

PRESENCE = [(True, True), (False, True), (True, False), (False, False)]


@pytest.fixture(scope="module")
def built() -> Built:
    return Built("rebq", components=3, length=2)


def summed(query: Tensor, pool: dict[str, Tensor], layer: int) -> Tensor:
    """Σ_k cos(q ⊙ A_k, K_k) P_k at one layer, in float64."""
    total = torch.zeros(pool["prompts"].shape[2:], dtype=torch.float64)
    for k in range(len(pool["keys"])):
        weight = cosine(query * pool["attention"][k, layer], pool["keys"][k, layer])
        total += weight * pool["prompts"][k, layer].double()
    return total


def test_what_is_missing_is_asked_for_by_what_is_there(built: Built) -> None:
    asked, held = queries(PRESENCE), built.held()
    plan = built.plan(asked, PRESENCE)
    for row, (has_image, has_text) in enumerate(PRESENCE):
        image, text, instruction = (q[row] for q in asked)
        if not has_image:
            image_query = summed(text if has_text else instruction, held["memory"], 0)[0].float()
        if not has_text:
            text_query = summed(image if has_image else instruction, held["memory"], 0)[1].float()
        wanted_image = image if has_image else image_query
        wanted_text = text if has_text else text_query
        for layer in plan.keys:
            parts = [summed(wanted_text, held["text"], layer), summed(wanted_image, held["image"], layer)]
            whole = torch.cat(parts, dim=2)  # keys and values × heads × length × width
            assert torch.allclose(plan.keys[layer][row].double(), whole[0], atol=1e-5)
            assert torch.allclose(plan.values[layer][row].double(), whole[1], atol=1e-5)


def test_the_reconstruction_term_is_the_squared_distance_over_both_copies(built: Built) -> None:
    asked, held = queries(PRESENCE), built.held()
    plan = built.plan(asked, PRESENCE)
    memory = {n: t.detach() for n, t in held["memory"].items()}
    from_text, from_image = (summed(q[0], memory, 0) for q in (asked.text, asked.image))
    wanted = (from_text[0] - asked.image[0]).square().sum() + (from_image[1] - asked.text[0]).square().sum()
    assert float(plan.terms["reconstruct"][0].detach()) == pytest.approx(float(wanted), rel=1e-5)
    assert not plan.terms["reconstruct"][1:].any(), "only complete rows have copies"
    batch = built.bench.batch(items("task0"))
    assert built.method.counts(batch)["reconstruct"] == 4.0, "two complete rows, two copies each"


def test_a_copy_with_a_modality_removed_asks_with_the_row_s_own_query(built: Built) -> None:
    """Why copies need no forward of their own: the queries left are equal, bit for bit."""
    complete = [(record, (True, True)) for record in records("task0")[:2]]
    assert all(all(shown(item)) for item in complete)

    def asked(rows: Any) -> Queries:
        batch = built.bench.batch(rows)
        return frozen_queries(built.model, RouteInputs.from_batch(batch), batch.inputs)

    whole = asked(complete)
    without_image = asked([(record, (False, True)) for record, _ in complete])
    without_text = asked([(record, (True, False)) for record, _ in complete])
    assert torch.equal(without_image.text, whole.text) and not without_image.image.any()
    assert torch.equal(without_text.image, whole.image) and not without_text.text.any()
    memory = built.held()["memory"]
    both = reconstructed(whole, torch.ones(2, 2, dtype=torch.bool), memory)
    for copies, presence, place in ((without_image, (False, True), 0), (without_text, (True, False), 1)):
        rebuilt = reconstructed(copies, torch.tensor([presence] * 2), memory)
        assert torch.equal(rebuilt[:, place], both[:, place])


def test_a_memory_that_knows_the_other_modality_has_no_error() -> None:
    """One component whose weight is one: q̂ is its prompt."""
    text, image = unit(1, WIDTH), unit(1, WIDTH)
    ones = torch.ones(1, 1, WIDTH)
    memory = {"keys": text.unsqueeze(1), "attention": ones, "prompts": torch.stack([image, text], 1)[None]}
    memory["prompts"] = torch.stack([image, image], 1).unsqueeze(1)
    found = reconstructed(Queries(image, text, unit(1, WIDTH)), torch.ones(1, 2, dtype=torch.bool), memory)
    assert torch.allclose(found[0, 0], image[0], atol=1e-5)


def test_complete_rows_are_not_led_by_the_memory(built: Built) -> None:
    asked, held = queries(PRESENCE), built.held()
    other = {n: torch.randn_like(t) for n, t in held["memory"].items()}
    told = [
        built.method.plan(built.model, held | {"memory": pool}, inputs(PRESENCE), asked)
        for pool in (held["memory"], other)
    ]
    for layer in told[0].keys:
        same = [torch.equal(a, b) for a, b in zip(told[0].keys[layer], told[1].keys[layer], strict=True)]
        assert same == [True, False, False, False]


def test_the_target_gets_no_gradient_and_every_pool_gets_one(built: Built) -> None:
    batch = built.bench.batch(items("task0"))
    sums = built.method.loss_sums(built.model, batch)
    pools = prompts_of(built.model).trained
    names = [name for name, _ in pools.named_parameters()]
    parameters = list(pools.parameters())
    by_answer, by_term = (
        dict(
            zip(names, torch.autograd.grad(s, parameters, retain_graph=True, allow_unused=True), strict=True)
        )
        for s in (sums["answer"], sums["reconstruct"])
    )
    for name in names:
        learned = by_answer[name]
        assert learned is not None and (learned.flatten(1).abs().amax(1) > 0).all(), name
        assert (by_term[name] is not None) == name.startswith("memory"), name
    embeddings = built.model.get_input_embeddings().weight
    assert not embeddings.requires_grad


def test_without_complete_rows_there_is_no_reconstruction(built: Built) -> None:
    rows = [item for item in items("task0") if not all(item[1])]
    batch: Any = built.bench.batch(rows)
    assert built.method.counts(batch)["reconstruct"] == 0.0
    assert float(built.method.loss_sums(built.model, batch)["reconstruct"].detach()) == 0.0


def test_fresh_components_are_alive_and_orthogonal_to_earlier_ones() -> None:
    """R1: in the released code they are zero, and stay so."""
    told = story("rebq")
    bench = Bench("rebq")
    past = {"task0": Past(told.trained[0].folder, told.stages[0].tasks)}
    model: Any = bench.method.begin(bench.base(), Stage(1, "task1", past=past))
    sums = bench.method.loss_sums(model, bench.batch(items("task1")))
    (sums["answer"] + sums["reconstruct"]).backward()
    for pool in ("memory", "text", "image"):
        held, fresh = prompts_of(model).earlier[pool], prompts_of(model).trained[pool]
        for name, parameter in fresh.named_parameters():
            for layer in range(parameter.shape[1]):
                rows, before = (
                    parameter[:, layer].flatten(1).detach(),
                    getattr(held, name)[:, layer].flatten(1),
                )
                assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-5)
                assert float((rows @ before.T).abs().max()) < 1e-5
                assert (parameter.grad[:, layer].flatten(1).abs().amax(1) > 0).all(), (pool, name)


def test_earlier_components_keep_their_bits_under_weight_decay(tmp_path: Any) -> None:
    """R2: in the released code they drift by rate times decay."""
    bench, told = Bench("rebq", "llava", "none", "--train.weight_decay=0.5"), story("rebq")
    past = {"task0": Past(told.trained[0].folder, told.stages[0].tasks)}
    done = bench.train(replace(told.stages[1], past=past), tmp_path / "stage")
    for name, tensor in told.trained[0].end.items():
        _, _, pool, part = name.split(".")
        assert torch.equal(getattr(prompts_of(done.model).earlier[pool], part), tensor), name
        assert not torch.equal(done.start[name], done.end[name])
    trained = {id(p) for p in prompts_of(done.model).trained.parameters()}
    groups = bench.method.groups(done.model, bench.config.train)
    assert {id(p) for group in groups for p in group["params"]} == trained


def test_the_number_of_components_can_match_another_method() -> None:
    def trained(name: str, **options: Any) -> int:
        model = Bench(name, **options).begin(Stage(0, "task0"))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    each = trained("rebq", components=2) - trained("rebq", components=1)
    assert abs(trained("rebq", components="match") - trained("delo")) <= each / 2
