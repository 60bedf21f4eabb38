"""CODA-Prompt: attention to components against loops in float64, and components that live, stay and are
orthogonal."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from prompts_support import WIDTH, Built, cosine, queries, unit

from delo_llava.errors import DeloError
from delo_llava.methods._components import attention, mixed_prompts, orthonormal
from delo_llava.methods._prompts import prompts_of
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.coda_prompt import overlap

PRESENCE = [(True, True), (False, True), (True, False)]
SHAPE = (2, 2, 2, 3, 4)  # layers, keys and values, heads, length, width


def pool(count: int = 5, width: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    keyed = {name: torch.randn(count, SHAPE[0], width) for name in ("keys", "attention")}
    return {"prompts": torch.randn(count, *SHAPE), **keyed}


def test_weights_are_cosines_and_prompts_their_sums() -> None:
    given, asked = pool(), unit(3, 8)
    weights, prompts = attention(asked, given), mixed_prompts(asked, given)
    for row in range(3):
        for layer in range(SHAPE[0]):
            wanted = [
                cosine(asked[row] * given["attention"][k, layer], given["keys"][k, layer]) for k in range(5)
            ]
            assert weights[row, layer].tolist() == pytest.approx(wanted, abs=1e-6)
            mixed = sum(w * given["prompts"][k, layer].double() for k, w in enumerate(wanted))
            assert torch.allclose(prompts[row, layer].double(), mixed, atol=1e-5)


def test_weights_ignore_the_length_of_queries_and_keys_and_a_missing_query_has_none() -> None:
    given, asked = pool(), unit(3, 8)
    longer = given | {"keys": given["keys"] * 7}
    assert torch.allclose(attention(asked * 0.01, longer), attention(asked, given), atol=1e-6)
    absent = torch.zeros(1, 8, requires_grad=True)
    weights = attention(absent, given)
    assert not weights.any()
    (gradient,) = torch.autograd.grad(weights.sum(), absent)
    assert gradient.isfinite().all()


def test_the_orthogonality_term_is_the_mean_square_overlap() -> None:
    rows = torch.randn(3, 2, 5)
    wanted = 0.0
    for layer in range(2):
        gram = torch.tensor([[float(rows[i, layer] @ rows[j, layer]) for j in range(3)] for i in range(3)])
        wanted += float((gram - torch.eye(3)).square().mean())
    assert float(overlap(rows)) == pytest.approx(wanted, rel=1e-5)
    assert float(overlap(orthonormal(3, (2, 5), None))) < 1e-10


def test_fresh_rows_are_orthonormal_to_each_other_and_to_what_training_made_of_earlier_ones() -> None:
    earlier = torch.randn(4, 2, 3, 5) * 3  # neither of length one nor orthogonal
    fresh = orthonormal(6, (2, 3, 5), earlier)
    for layer in range(2):
        rows, before = fresh[:, layer].flatten(1).double(), earlier[:, layer].flatten(1).double()
        assert torch.allclose(rows @ rows.T, torch.eye(6, dtype=torch.float64), atol=1e-6)
        assert float((before @ rows.T).abs().max()) < 1e-5
    with pytest.raises(DeloError, match="no room for further"):
        orthonormal(12, (2, 3, 5), earlier)


def test_components_of_every_task_are_alive() -> None:
    """At the start of a later task: of length one, orthogonal to the earlier ones, and with a gradient."""
    told = story("coda_prompt")
    bench = Bench("coda_prompt")
    past = {"task0": Past(told.trained[0].folder, told.stages[0].tasks)}
    model: Any = bench.method.begin(bench.base(), Stage(1, "task1", past=past))
    held, fresh = prompts_of(model).earlier["components"], prompts_of(model).trained["components"]
    sums = bench.method.loss_sums(model, bench.batch(items("task1")))
    sums["answer"].backward()
    for name, parameter in fresh.named_parameters():
        for layer in range(2):
            rows, before = parameter[:, layer].flatten(1), getattr(held, name)[:, layer].flatten(1)
            assert torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-5)
            assert float((rows @ before.T).detach().abs().max()) < 1e-5
            assert (parameter.grad[:, layer].flatten(1).abs().amax(1) > 0).all(), (name, layer)


def test_earlier_components_keep_their_bits_under_weight_decay(tmp_path: Any) -> None:
    bench = Bench("coda_prompt", "llava", "none", "--train.weight_decay=0.5")
    told = story("coda_prompt")
    past = {"task0": Past(told.trained[0].folder, told.stages[0].tasks)}
    stage = Stage(1, "task1", told.stages[1].tasks, past, told.stages[1].seed)
    done = bench.train(stage, tmp_path / "stage")
    held = prompts_of(done.model).earlier["components"]
    for name, tensor in told.trained[0].end.items():
        assert torch.equal(getattr(held, name.rpartition(".")[2]), tensor)
    groups = bench.method.groups(done.model, bench.config.train)
    assert sum(len(group["params"]) for group in groups) == 3, "they are in no optimiser"
    assert groups[0]["weight_decay"] == 0.5, "fresh ones are decayed"


def test_a_plan_mixes_the_views_a_row_has() -> None:
    built = Built("coda_prompt", ortho=0.0)
    asked, held = queries(PRESENCE), built.held()["components"]
    plan = built.plan(asked, PRESENCE)
    assert not plan.terms and "ortho" not in built.method.weights(None)
    joined = torch.cat(list(asked), 1)
    assert joined.shape[1] == 3 * WIDTH
    prompts = mixed_prompts(joined, held)
    for layer in range(2):
        assert torch.allclose(plan.keys[layer], prompts[:, layer, 0], atol=1e-6)
        assert torch.allclose(plan.values[layer], prompts[:, layer, 1], atol=1e-6)


def test_the_number_of_components_can_match_another_method() -> None:
    def trained(name: str, **options: Any) -> int:
        model = Bench(name, **options).begin(Stage(0, "task0"))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    each = trained("coda_prompt", components=2) - trained("coda_prompt", components=1)
    assert abs(trained("coda_prompt", components="match") - trained("delo")) <= each / 2
