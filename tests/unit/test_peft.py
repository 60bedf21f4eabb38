"""Our tuners as PEFT's own are: what a user of PEFT may ask of any adapter, asked of each of ours."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import delo_support
import pytest
import torch
from delo_support import COMPLETE, LANGUAGE, NO_IMAGE, NO_TEXT, PROJECTORS, base, batch, changed
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from delo_llava.adapters.carrier import Carrier, checkpoint_contexts, find_carrier, routing
from delo_llava.adapters.lowrank import LowRankConfig, LowRankModel, RowPlan, mixed, sum_of
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.delo.tuner import tuner

ROWS = [COMPLETE, NO_IMAGE, NO_TEXT, COMPLETE]


@dataclass(frozen=True)
class Kind:
    """One of our tuners, in one configuration.

    Attributes:
        config: makes the adapter's configuration.
        routed: every forward wants `routing`.
        prepare: what a method does to a model with adapters before it is used.
    """

    name: str
    config: Callable[[], PeftConfig]
    routed: bool
    prepare: Callable[[Any], Any] = lambda model: model

    def wrapped(self, *tasks: str, seed: int = 0) -> Any:
        """A fresh base with an adapter for each task (by default `one`) that has an effect."""
        torch.manual_seed(seed)
        first, *others = tasks or ("one",)
        model = get_peft_model(base(), self.config(), adapter_name=first)
        for task in others:
            model.add_adapter(task, self.config())
        return self.prepare(enlivened(model)).eval()

    def opened(self, folder: Path, **options: Any) -> Any:
        """What PEFT makes of a folder."""
        return self.prepare(
            PeftModel.from_pretrained(base(), str(folder), adapter_name="one", **options)
        ).eval()

    def logits(self, model: Any, route: RouteInputs | None = None) -> Tensor:
        """Of the batch that all tests use."""
        inputs, made = batch(model, ROWS)
        with torch.no_grad(), routing(model, route or made) if self.routed else nullcontext():
            found: Tensor = model(**inputs).logits
        return found


def enlivened(model: Any) -> Any:
    """Draw what starts at zero."""
    for name, parameter in model.named_parameters():
        if "_B." in name or name.endswith("_up"):
            nn.init.normal_(parameter, std=0.1)
    return model


def delo(**changes: Any) -> Callable[[], PeftConfig]:
    """Makes configurations of DeLo."""
    return lambda: delo_support.config(**changes)


def pairs(**changes: Any) -> Callable[[], PeftConfig]:
    """Makes configurations of low-rank pairs."""
    projector, pattern, hidden = PROJECTORS["llava"]
    given = {"target_modules": LANGUAGE, "projector_modules": pattern, "projector": projector}
    return lambda: LowRankConfig(hidden_size=hidden, r=4, alpha=8.0, **given, **changes)


def by_row(model: Any) -> Any:
    """Pairs that count as much as a sample's instruction says."""

    def decide(inputs: RouteInputs, queries: Any) -> RowPlan:
        return RowPlan({"c": 1 + torch.tanh(10 * queries.instruction[:, :1])}, inputs)

    def mix(layer: Any, x: Tensor) -> Tensor:
        found = sum_of(layer, layer.active_adapters, x)
        return found * layer.carrier.current().at(layer, "c", found)

    return mixed(model, mix, decide)


KINDS = (
    Kind("delo", delo(), routed=True),
    Kind("delo_linear", delo(cross_modal="linear", scope="all"), routed=True),
    Kind("delo_ridge", delo(cross_modal="ridge", pools="shared"), routed=True),
    Kind("delo_exact", delo(conditional="factor", gate="softmax"), routed=True),
    Kind("pairs", pairs(), routed=False),
    Kind("pairs_routed", pairs(outputs=3), routed=True, prepare=by_row),
)
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def plain_logits() -> Tensor:
    """The bare base's."""
    model = base()
    with torch.no_grad():
        found: Tensor = model(**batch(model, ROWS)[0]).logits
    return found


# ---- files ----
@every
@pytest.mark.parametrize("empty", [False, True], ids=["drawn", "low_cpu_mem_usage"])
def test_saved_and_opened_by_peft_it_computes_the_same_bits(kind: Kind, empty: bool, tmp_path: Path) -> None:
    model = kind.wrapped("one", "two")
    expected = kind.logits(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["one"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT would go on
        again = kind.opened(tmp_path / "one", low_cpu_mem_usage=empty)
    assert torch.equal(kind.logits(again), expected) and not torch.equal(expected, plain_logits())
    assert not [n for n, p in again.named_parameters() if p.is_meta or p.requires_grad]
    mine, theirs = (get_peft_model_state_dict(m, adapter_name="one") for m in (model, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@every
def test_a_second_adapter_is_loaded_beside_the_first(kind: Kind, tmp_path: Path) -> None:
    kind.wrapped("one", "two", seed=4).save_pretrained(str(tmp_path))
    model = kind.opened(tmp_path / "one")
    before = kind.logits(model)
    for name, empty in (("two", False), ("three", True)):
        model.load_adapter(str(tmp_path / "two"), adapter_name=name, low_cpu_mem_usage=empty)
    assert torch.equal(kind.logits(model), before), "loading activates nothing"
    found = []
    for name in ("two", "three"):
        model.set_adapter(name)
        found.append(kind.logits(model))
    assert torch.equal(*found) and not torch.equal(found[0], before)


@every
def test_what_peft_writes_about_it_names_it(kind: Kind, tmp_path: Path) -> None:
    """Status, card, configuration and its copies: PEFT asks its keys for `value`."""
    model = kind.wrapped()
    name = {True: "DELO", False: "DELO_LOWRANK"}["delo" in kind.name]
    status = model.get_model_status()
    assert status.peft_types == {"one": name} and status.active_adapters == ["one"] and status.enabled is True
    assert status.num_adapter_layers == len(model.get_layer_status()) == 16
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").is_file() and f'"peft_type": "{name}"' in (
        tmp_path / "one" / "adapter_config.json"
    ).read_text()
    again = PeftConfig.from_pretrained(str(tmp_path / "one"))
    assert type(again) is type(kind.config()) and again.peft_type == name == again.peft_type.value
    with pytest.raises(ValueError, match=f"only supports .* but {name} was passed"):
        hotswap_adapter(model, str(tmp_path / "one"), "one", torch_device="cpu")


# ---- switched off, taken away ----
@every
def test_switched_off_it_is_the_base_and_on_again_what_it_was(kind: Kind) -> None:
    model = kind.wrapped()
    expected, trained = kind.logits(model), [n for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch(model, ROWS)[0]).logits, plain_logits())
    assert torch.equal(kind.logits(model), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


@every
def test_unloaded_the_base_is_as_it_was_and_can_be_wrapped_again(kind: Kind) -> None:
    bare = base()
    modules = {name: type(module) for name, module in bare.named_modules()}
    model = kind.wrapped("one", "two")
    expected = kind.logits(model)
    left = model.unload()
    assert {name: type(module) for name, module in left.named_modules()} == modules
    hooks = [h for m in left.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in hooks if isinstance(getattr(h, "__self__", None), Carrier)]
    assert find_carrier(left) is None and not hasattr(left, "peft_config")
    with torch.no_grad():
        assert torch.equal(left(**batch(left, ROWS)[0]).logits, plain_logits())
    torch.manual_seed(0)
    again = get_peft_model(left, kind.config(), adapter_name="one")
    again.add_adapter("two", kind.config())
    assert torch.equal(kind.logits(kind.prepare(enlivened(again)).eval()), expected)


@every
def test_without_its_last_adapter_it_is_the_base_and_takes_a_new_one(kind: Kind) -> None:
    model = kind.wrapped("one", "two")
    second = kind.wrapped("one", "two")
    second.set_adapter("two")
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert torch.equal(kind.logits(model), kind.logits(second))
    model.delete_adapter("two")
    assert not list(model.peft_config) and not [n for n, _ in model.named_parameters() if ".two." in n]
    # A PeftModel without adapters asks in vain for the configuration of the active one; its tuner answers.
    assert torch.equal(kind.logits(model.base_model), plain_logits())
    with torch.no_grad():
        assert torch.equal(model.base_model(**batch(model, ROWS)[0]).logits, plain_logits()), "unrouted, too"
    model.add_adapter("three", kind.config())
    model.set_adapter("three")
    assert not torch.equal(kind.logits(enlivened(model)), plain_logits())


# ---- together, merged ----
@every
def test_merging_says_why_it_cannot_and_what_can(kind: Kind) -> None:
    model = kind.wrapped()
    expected = kind.logits(model)
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    fix = r"delo-llava export --run" if kind.name == "pairs" else r"keep the adapters beside their base"
    for ask in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(NotImplementedError, match=rf"cannot be merged: \w+ .+(.|\n)*fix: +{fix}") as told:
            ask()
        assert isinstance(told.value, DeloError)
    model.unmerge_adapter()
    assert torch.equal(kind.logits(model), expected), "nothing was half done"


def test_two_active_tasks_of_delo_are_refused_and_the_first_stays() -> None:
    kind = KINDS[0]
    model = kind.wrapped("one", "two")
    expected = kind.logits(model)
    with pytest.raises(DeloError, match=r"One task's experts are active(.|\n)*one, two(.|\n)*tasks="):
        model.base_model.set_adapter(["one", "two"])
    assert torch.equal(kind.logits(model), expected) and model.active_adapters == ["one"]
    _, route = batch(model, ROWS)
    several = kind.logits(model, changed(route, tasks=["one", "two", "two", "one"]))
    assert torch.equal(several[0], expected[0]) and not torch.equal(several[1], expected[1])


def test_two_active_pairs_add_up() -> None:
    """As PEFT's LoRA: a linear's outputs are those of a weight with both updates."""
    model = KINDS[4].wrapped("one", "two")
    model.base_model.set_adapter(["one", "two"])
    layer: Any = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        added = sum(layer.scale[n] * x @ layer.pair(n)[0].T @ layer.pair(n)[1].T for n in ("one", "two"))
        torch.testing.assert_close(layer(x), layer.base_layer(x) + added)
    assert model.get_model_status().active_adapters == ["one", "two"]


# ---- wrapped further ----
@pytest.mark.long  # compiling is slow
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]], ids=lambda kind: kind.name)
def test_compiled_it_is_found_and_routed(kind: Kind) -> None:
    model = kind.wrapped()
    compiled: Any = torch.compile(model, backend="eager")
    assert find_carrier(compiled) is find_carrier(model)
    if isinstance(model.base_model, LowRankModel):
        assert next(m for m in compiled.modules() if isinstance(m, LowRankModel)) is model.base_model
    else:
        assert tuner(compiled) is model.base_model
    torch.testing.assert_close(kind.logits(compiled), kind.logits(model))


@pytest.mark.parametrize("kind", [k for k in KINDS if k.routed], ids=lambda kind: kind.name)
def test_checkpointing_without_its_context_says_so(kind: Kind) -> None:
    def gradients(**options: Any) -> dict[str, Tensor]:
        model = kind.wrapped().train()
        model.enable_input_require_grads()
        if options:
            given = {name: made(model) if callable(made) else made for name, made in options.items()}
            model.gradient_checkpointing_enable(given)
        inputs, route = batch(model, ROWS)
        with routing(model, route):
            loss = model(**inputs).logits.square().mean()
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with pytest.raises(DeloError, match=r"Gradient checkpointing(.|\n)*context_fn.*checkpoint_contexts"):
        gradients(use_reentrant=False)
    found, expected = gradients(use_reentrant=False, context_fn=checkpoint_contexts), gradients()
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def test_without_routing_the_message_is_about_routing() -> None:
    model = KINDS[0].wrapped()
    with pytest.raises(DeloError, match="nothing says how to route"):
        model(**batch(model, ROWS)[0])
