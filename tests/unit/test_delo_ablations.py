"""DeLo with parts taken away: every option does what it says, contradictions are refused, and what is left
still keeps the contract of methods."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract_support as contract
import pytest
import torch
from contract import test_methods as promises
from contract_support import Bench, items
from delo_support import COMPLETE, NO_IMAGE, NO_TEXT, batch, changed, config, experts, run, same_routes
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.own import TENSORS
from delo_llava.backbones.base import adapted_linears
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError
from delo_llava.methods._linears import narrowed
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.delo.config import trainable_parameter_count
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.method import Delo
from delo_llava.methods.delo.options import DeloOptions, adapter_config, trainable_parameters
from delo_llava.methods.delo.tuner import tuner

ROWS = [COMPLETE, NO_IMAGE, NO_TEXT, COMPLETE]


# ---- no pools of the modalities' own ----
def test_both_modalities_choose_from_one_shared_pool() -> None:
    """Every layer's output against the sum over factors written out in float64, from a single table."""
    model = experts(("one", "two"), pools="shared")
    inputs, route = batch(model, ROWS)
    route = changed(route, tasks=["one", "two", "one", "two"])
    seen: list[tuple[DeloLayer, Tensor, Tensor]] = []
    layers = tuner(model).layers()[0]
    hooks = [layer.register_forward_hook(lambda m, a, y: seen.append((m, a[0], y))) for layer in layers]
    with torch.no_grad():
        plan = run(model, inputs, route)[1]
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers)
    skip = len(tuner(model).layers()[1])
    for slot, (layer, x, y) in enumerate(seen):
        for row, task in enumerate(plan.tasks):
            pools = [getattr(layer, f"delo_{side}")[task].weight.double() for side in "AB"]
            assert len(pools[0]) == len(pools[1]) == config().pool_size, "one pool, not two"
            own = x[row].double()
            expected = layer.base_layer(x[row]).double()
            is_image = (route.segments[row] == 1).double().unsqueeze(1)
            for modality, mask, at in (("image", is_image, slot + skip), ("text", 1 - is_image, slot)):
                chosen = (getattr(plan.selection, f"{modality}_{s}")[row, at].tolist() for s in "ab")
                for a, b in zip(*chosen, strict=True):
                    expected += 2.0 * mask * (own @ pools[0][a]).unsqueeze(1) * pools[1][b]
            torch.testing.assert_close(y[row].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"conditional": "factor"}, {"gate": "none"}])
def test_a_shared_pool_is_counted_once(options: dict[str, Any]) -> None:
    model = experts(live=False, pools="shared", **options)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linears = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, DeloLayer)
    }
    assert trainable_parameter_count(config(pools="shared", **options), linears) == real
    assert trainable_parameter_count(config(**options), linears) > real


# ---- no guidance from the other modality ----
def test_without_guidance_a_missing_query_is_zero_whatever_is_present() -> None:
    lone, guided = experts(cross_modal="none"), experts(cross_modal="identity")
    for model, alike in ((lone, True), (guided, False)):
        routes = []
        for seed in (1, 2):  # other words, so other present queries
            inputs, route = batch(model, [NO_IMAGE, NO_IMAGE], seed=seed)
            with torch.no_grad():
                routes.append(run(model, inputs, route)[1].selection)
        assert torch.equal(routes[0].image_a, routes[1].image_a) == alike
        assert not torch.equal(routes[0].text_a, routes[1].text_a)
    router = tuner(lone).delo_router["one"]
    bias = router.image_bias.view(-1, 2, config().pool_size)[:, 0]
    expected = bias.sort(descending=True, stable=True).indices[:, : config().r]
    assert torch.equal(routes_of(lone, [NO_IMAGE]).image_a[0], expected)
    complete = [COMPLETE, COMPLETE]
    inputs, route = batch(lone, complete)
    with torch.no_grad():
        assert same_routes(run(lone, inputs, route)[1], run(guided, inputs, route)[1]), "nothing is missing"


def routes_of(model: Any, rows: list[tuple[bool, bool]]) -> Any:
    """The selection of one forward."""
    inputs, route = batch(model, rows)
    with torch.no_grad():
        return run(model, inputs, route)[1].selection


# ---- a random router ----
def test_an_index_only_router_stays_as_it_was_drawn_and_still_routes_by_sample(tmp_path: Path) -> None:
    bench = Bench("delo", gate="none")
    stage = bench.stages()[0]
    drawn = {n: p.clone() for n, p in bench.begin(stage).named_parameters() if "delo_router" in n}
    done = bench.train(stage, tmp_path / stage.name)
    assert drawn and not [name for name in done.end if "delo_router" in name]
    kept = dict(done.model.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in drawn.items())
    model = experts(gate="none")
    chosen = routes_of(model, [COMPLETE, COMPLETE])
    assert not torch.equal(chosen.image_a[0], chosen.image_a[1])


# ---- where experts sit ----
@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"linears": "qkv"}, {"q_proj", "k_proj", "v_proj", "linear_1", "linear_2"}),
        ({"linears": "attention", "projector": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"linears": "qkv", "projector": False, "scope": "all"}, {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_experts_sit_where_they_are_told(options: dict[str, Any], ends: set[str], tmp_path: Path) -> None:
    bench = Bench("delo", **options)
    stage = bench.stages()[0]
    done = bench.train(stage, tmp_path / stage.name)
    names = [n for part in tuner(done.model).layer_names() for n in part]
    assert {name.rpartition(".")[2] for name in names} == ends
    count = trainable_parameters(bench.method.options, bench.base(), bench.backbone)
    assert count == sum(t.numel() for t in done.end.values()) > 0
    assert any("image_head" in n and not torch.equal(done.start[n], t) for n, t in done.end.items()), (
        "images are routed though the projector has no experts"
    )
    loaded = bench.loaded({stage.name: Past(done.folder, stage.tasks)})
    assert torch.equal(bench.logits(loaded, items("task0")), bench.logits(done.model, items("task0")))


def test_a_family_without_such_linears_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("delo", linears="attention")
    plain = type(bench.backbone)()
    plain.language_pattern = r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
    with pytest.raises(DeloError, match=r"(?s)no language linears of this kind.*linears=attention"):
        trainable_parameters(bench.method.options, bench.base(), plain)
    everywhere = adapted_linears(bench.base(), bench.backbone)
    assert narrowed(bench.backbone.language_pattern, "all") == bench.backbone.language_pattern
    assert len(everywhere) > 6


# ---- which task ----
def test_shared_pools_go_on_from_task_to_task_and_choose_none(tmp_path: Path) -> None:
    bench = Bench("delo", task="shared")
    first, second = bench.stages()
    one = bench.train(first, tmp_path / first.name)
    past = {first.name: Past(one.folder, first.tasks)}
    two = bench.train(Stage(1, second.name, second.tasks, past, second.seed), tmp_path / second.name)
    assert two.start.keys() == one.end.keys()
    assert all(torch.equal(two.start[n], t) for n, t in one.end.items() if "delo_cross" not in n)
    assert not (two.folder / "task_keys.safetensors").exists()
    loaded = bench.loaded(past | {second.name: Past(two.folder, second.tasks)})
    rows = bench.batch([*items("task0")[:2], *items("task1")[:2]], generation=True)
    assert bench.method.choose(loaded, rows) is None and not bench.method.capabilities.chooses_task
    with torch.no_grad(), bench.method.answering(loaded, rows, None) as prompt:
        loaded(**prompt.inputs)
    use = bench.method.routing_use(loaded)
    assert use is not None and {pool["task"] for pool in use["pools"]} == {"task0", "task1"}
    assert bench.method.footprint(bench.base()).every_task is False


def test_an_oracle_is_told_the_task_and_keeps_no_keys(tmp_path: Path) -> None:
    bench = Bench("delo", task="oracle")
    stage = bench.stages()[0]
    done = bench.train(stage, tmp_path / stage.name)
    assert bench.method.capabilities.needs_task and not bench.method.capabilities.chooses_task
    assert not (done.folder / "task_keys.safetensors").exists()
    keyed = Bench("delo").train(stage, tmp_path / "keyed")
    same = load_file(done.folder / TENSORS), load_file(keyed.folder / TENSORS)
    assert same[0].keys() == same[1].keys()
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items()), "keys change no bit"
    stored = [Bench("delo", task=t).method.footprint(bench.base()).stored_bytes for t in ("oracle", "chosen")]
    assert stored[0] < stored[1]


# ---- what means nothing ----
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"align": 0.1, "cross_modal": "none"}, "maps nothing"),
        ({"align": 0.1, "gate": "none"}, "which gate=none freezes"),
        ({"cross_modal": "linear", "gate": "none"}, "leaves it neither"),
        ({"task": "shared", "matcher": "cosine"}, "task=shared chooses none"),
        ({"task": "oracle", "views": ("image",)}, "task=oracle chooses none"),
        ({"rank": 5, "pool_size": 4}, "larger than pool_size"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DeloOptions(**options)
    for name in options:  # each alone is fine
        if name not in ("rank", "pool_size"):
            DeloOptions(**{name: options[name], "gate": "ste"} if name != "gate" else {name: options[name]})


def test_the_defaults_are_the_method_itself() -> None:
    options = DeloOptions()
    assert (options.pools, options.task, options.linears, options.projector) == (
        "modality", "chosen", "all", True,
    )  # fmt: skip
    bench = Bench("delo")
    assert Delo(options, RunConfig(method="delo"), bench.backbone).capabilities == Delo.capabilities


# ---- the contract ----
ABLATIONS: dict[str, dict[str, Any]] = {
    "shared_pools": {"pools": "shared", "cross_modal": "none", "projector": False, "linears": "qkv"},
    "one_set_for_all": {"task": "shared", "gate": "none"},
    "oracle": {"task": "oracle", "pools": "shared", "scope": "all"},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long if name == "oracle" else ()) for name in ABLATIONS],
)
def ablated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The contract's stories of `delo` are those of an ablation."""
    before = contract.SMALL["delo"]
    contract.SMALL["delo"] = before | ABLATIONS[request.param]
    contract.story.cache_clear()
    yield
    contract.SMALL["delo"] = before
    contract.story.cache_clear()


@pytest.mark.parametrize(
    "promise",
    [
        promises.test_a_stage_starts_from_what_stands,
        promises.test_all_that_is_declared_to_train_changes_and_nothing_else,
        promises.test_files_of_a_stage_hold_all_of_it_and_stay,
        promises.test_what_is_missing_is_not_seen,
    ],
)
def test_an_ablation_keeps_the_contract(ablated: None, promise: Any) -> None:
    promise("delo", "llava")


def test_an_ablation_answers_alike_in_any_company(ablated: None) -> None:
    for beams in (1, 2):
        promises.test_a_row_is_answered_alike_in_any_company("delo", "llava", beams)


def test_an_ablation_is_isolated_or_not_as_it_says_and_counts_its_parameters(ablated: None) -> None:
    promises.test_what_a_stage_trains_answers_for_its_own_tasks_alone_where_that_is_said("delo")
    promises.test_a_footprint_is_what_is_trained("delo")
    promises.test_recomputed_activations_change_nothing("delo")
    promises.test_the_bare_base_answers_before_any_training("delo")


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4}, 8.0),
        ({"rank": 16}, 4.0),
        ({"rank": 1}, 16.0),
        ({"rank": 2, "scope": "all"}, 8.0),  # four factors act on every token
        ({"rank": 4, "alpha": 4.0}, 2.0),
        ({"rank": 4, "alpha_over_rank": 2.0}, 2.0),
    ],
)
def test_the_scale_falls_with_the_root_of_the_factors_that_act(options: dict[str, Any], scale: float) -> None:
    """And not with the pool: docs/delo.md has the trials."""
    for pool in (16, 64):
        found = DeloOptions(pool_size=pool, **options)
        assert found.scale == scale
    bench = Bench("delo", pool_size=16, **options)
    made = adapter_config(bench.method.options, bench.base(), bench.method.backbone)
    assert made.scale == pytest.approx(scale)
