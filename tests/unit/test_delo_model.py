"""DeLo inside PEFT: injection, gradients, partition of tasks, files, 4 bit, checkpointing (invariants 1, 3–5,
9, 11; traps T1–T3, T10, T14)."""

import hashlib
import json
from pathlib import Path

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
    enliven,
    experts,
    loss_of,
    run,
)
from peft import PeftModel, get_peft_model
from torch import Tensor

from delo_llava.adapters.carrier import checkpoint_contexts, routing
from delo_llava.adapters.store import open_adapters, save_adapter
from delo_llava.backbones.base import find_backbone
from delo_llava.errors import DeloError
from delo_llava.methods.delo.config import DeloConfig, trainable_parameter_count
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.tuner import set_trainable, tuner

ROWS = [COMPLETE, NO_IMAGE, NO_TEXT, COMPLETE]
LINEARS = 2 * 7 + 2


def logits(model, inputs, route) -> Tensor:
    with torch.no_grad():
        return run(model, inputs, route)[0].logits


def trained(model) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def linears(model) -> dict[str, tuple[int, int]]:
    found = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, DeloLayer)}
    return {n: (m.in_features, m.out_features) for n, m in found.items()}


@pytest.mark.parametrize("scope", ["own", "all"])
def test_fresh_experts_leave_the_base_bit_equal(scope: str) -> None:
    model = experts(live=False, scope=scope)
    inputs, route = batch(model, ROWS)
    with torch.no_grad(), model.disable_adapter():
        plain = model(**inputs).logits
    assert torch.equal(logits(model, inputs, route), plain)
    enliven(model)
    assert (logits(model, inputs, route) - plain).abs().max() > 1e-2


def test_every_expert_acts_exactly_once() -> None:
    """Trap T1: the released adapters never ran."""
    model, calls = experts(), []
    layers = [m for m in model.modules() if isinstance(m, DeloLayer)]
    for layer in layers:
        layer.delo_A["one"].register_forward_hook(lambda *_, layer=layer: calls.append(id(layer)))
    logits(model, *batch(model, ROWS))
    assert len(layers) == LINEARS and sorted(calls) == sorted(id(m) for m in layers)


@pytest.mark.parametrize(
    "options",
    [{}, {"cross_modal": "linear"}, {"gate": "softmax"}, {"conditional": "factor"}, {"conditional": "none"}],
)
def test_everything_trainable_gets_a_gradient(options: dict[str, str]) -> None:
    """B from the first step, A and router from the second (trap T3: released selectors never learn)."""
    model = experts(live=False, scope="all", **options)
    inputs, route = batch(model, ROWS)
    loss_of(model, inputs, route).backward()
    grads = {n: p.grad for n, p in trained(model).items()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert all(bool(g.any()) == ("delo_B" in n) for n, g in grads.items())
    enliven(model)
    model.zero_grad()
    loss_of(model, inputs, route).backward()
    assert not [n for n, p in trained(model).items() if not p.grad.any()]


def test_index_only_routing_freezes_the_router() -> None:
    model = experts(gate="none")
    assert not [n for n in trained(model) if "router" in n]
    straight = experts(gate="ste")
    inputs, route = batch(model, ROWS)
    assert torch.equal(logits(model, inputs, route), logits(straight, inputs, route)), (
        "the gate changes no value"
    )
    with_grad = run(straight, inputs, route)[0].logits
    torch.testing.assert_close(with_grad, logits(straight, inputs, route), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "none"},
        {"conditional": "factor"},
        {"conditional": "none"},
        {"cross_modal": "linear"},
        {"cross_modal": "ridge", "r": 3, "pool_size": 5},
    ],
)
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_parameter_count_in_closed_form(kind: str, options: dict[str, object]) -> None:
    model = experts(kind=kind, live=False, **options)
    real = sum(p.numel() for p in trained(model).values())
    assert trainable_parameter_count(config(kind, **options), linears(model)) == real


def test_only_the_current_task_trains() -> None:
    """Invariant 5: through steps with weight decay, nothing of another task or of the base changes by a
    bit."""
    model = experts(("one", "two"), cross_modal="linear", scope="all")
    set_trainable(model, "two")
    assert trained(model) and all(".two." in n for n in trained(model))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, *batch(model, ROWS, seed=seed)).backward()
        optimizer.step()
    changed_names = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed_names == set(trained(model))


def test_new_task_leaves_files_of_old_ones(tmp_path: Path) -> None:
    model = experts(("one",))
    save_adapter(model, "one", tmp_path / "one")
    kept = hashes(tmp_path / "one")
    model.add_adapter("two", config())
    set_trainable(model, "two")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss_of(model, *batch(model, ROWS)).backward()
    optimizer.step()
    save_adapter(model, "two", tmp_path / "two")
    save_adapter(model, "one", tmp_path / "again")
    assert hashes(tmp_path / "one") == kept == hashes(tmp_path / "again") != hashes(tmp_path / "two")


def test_start_is_a_function_of_the_seed() -> None:
    """Also for a later adapter, and whatever was there before."""
    first, other = experts(("one",), live=False, seed=7), experts(("zero",), live=False, seed=3)
    torch.manual_seed(7)
    other.add_adapter("one", config())
    one, two = ({n: t for n, t in m.state_dict().items() if ".one" in n} for m in (first, other))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_reload_is_bit_equal(tmp_path: Path, quant: str) -> None:
    """Through our loader and through PEFT's own, over fp32 and 4-bit bases; gradients flow over 4 bit."""
    import tiny_models

    backbone, path = find_backbone(tiny_models.session("llava"))

    def fresh():
        return backbone.load(path, quant=quant, device="cpu")

    torch.manual_seed(0)
    model = get_peft_model(fresh(), config(), adapter_name="one")
    model.add_adapter("two", config())
    enliven(model)
    set_trainable(model, "two")
    inputs, route = batch(model, ROWS)
    loss_of(model, inputs, route).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())
    for task in ("one", "two"):
        save_adapter(model, task, tmp_path / task)
    mixed = changed(route, tasks=["one", "two", "two", "one"])
    expected = logits(model.eval(), inputs, mixed)
    loaded = open_adapters(fresh(), {"one": tmp_path / "one", "two": tmp_path / "two"}, DeloConfig)
    assert torch.equal(logits(loaded, inputs, mixed), expected) and not trained(loaded)
    alone = PeftModel.from_pretrained(fresh(), str(tmp_path / "two"), adapter_name="renamed").eval()
    assert torch.equal(logits(alone, inputs, route), logits(model, inputs, changed(route, tasks="two")))


def test_files_hold_no_task_name_and_only_the_task(tmp_path: Path) -> None:
    """Trap T14: no aliases, no other tensors."""
    from safetensors import safe_open

    model = experts(("one", "two"), cross_modal="ridge")
    save_adapter(model, "two", tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names) == 2 * LINEARS + 8 + 4 and not [
        n for n in names if "one" in n.split(".") or "two" in n.split(".")
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELO"


def test_mixed_batch_equals_batches_of_one_task() -> None:
    model = experts(("one", "two", "three"))
    inputs, route = batch(model, ROWS)
    names = ["three", "one", "two", "one"]
    mixed = logits(model, inputs, changed(route, tasks=names))
    for task in set(names):
        alone = logits(model, inputs, changed(route, tasks=task))
        rows = [i for i, name in enumerate(names) if name == task]
        torch.testing.assert_close(mixed[rows], alone[rows], rtol=0, atol=2e-5)
        other = [i for i in range(4) if i not in rows]
        assert (mixed[other] - alone[other]).abs().max() > 1e-2


def test_tasks_are_chosen_by_the_given_function() -> None:
    model = experts(("one", "two"))
    inputs, route = batch(model, ROWS)
    seen = []

    def choose(queries, presence):
        seen.append((queries, presence))
        return ["two", "one", "one", "two"]

    with torch.no_grad(), routing(model, changed(route, choose=choose)) as entered:
        chosen = model(**inputs).logits
    assert torch.equal(chosen, logits(model, inputs, changed(route, tasks=["two", "one", "one", "two"])))
    assert (
        entered.plan.tasks == ["two", "one", "one", "two"]
        and len(seen) == 1
        and torch.equal(seen[0][1], route.presence)
    )


def test_absent_image_gives_image_pools_no_gradient() -> None:
    """Invariant 8, through the whole model."""
    model = experts()
    loss_of(model, *batch(model, [NO_IMAGE, NO_IMAGE])).backward()
    size = config().pool_size
    for layer in (m for m in model.modules() if isinstance(m, DeloLayer)):
        grad = layer.delo_B["one"].weight.grad
        assert grad is None if layer.projector else (not grad[:size].any() and bool(grad[size:].any()))


@pytest.mark.parametrize("between", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradient(between: bool) -> None:
    """Invariant 11, also with another forward (a teacher, other routes) before the backward pass
    recomputes."""
    model = experts()
    inputs, route = batch(model, ROWS)
    plain = loss_of(model.train(), inputs, route)
    plain.backward()
    expected = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts(model)})
    loss = loss_of(model, inputs, route)
    if between:
        logits(model, *batch(model, [NO_TEXT, COMPLETE], seed=9))
    loss.backward()
    assert torch.equal(loss, plain)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-7)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, inputs, route)
    with pytest.raises(DeloError, match="Gradient checkpointing"):  # so the test above does recompute
        loss.backward()


def test_routing_contexts_nest() -> None:
    """A teacher's forward within a student's context does not disturb it."""
    model = experts()
    inputs, route = batch(model, ROWS)
    expected = logits(model, inputs, route)
    with torch.no_grad(), routing(model, route) as outer:
        model(**inputs)
        logits(model, *batch(model, [NO_TEXT], seed=5))
        assert len(outer.plan.tasks) == len(ROWS)
        assert torch.equal(model(**inputs).logits, expected)
    assert not tuner(model).carrier.stack


def test_a_forward_without_routing_is_refused() -> None:
    model = experts()
    inputs, _ = batch(model, ROWS)
    with pytest.raises(DeloError, match="how to route"):
        model(**inputs)
    with model.disable_adapter():
        assert model(**inputs).logits.isfinite().all()


def test_half_precision_base_keeps_fp32_adapters() -> None:
    torch.manual_seed(0)
    model = get_peft_model(base(dtype=torch.bfloat16), config(), adapter_name="one")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    inputs, route = batch(model, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    loss_of(model, inputs, route).backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())


def test_exact_conditional_choice_is_refused_under_sharding() -> None:
    model = experts(conditional="factor")
    next(m for m in model.modules() if isinstance(m, DeloLayer)).delo_A["one"].weight.ds_id = 1
    with pytest.raises(DeloError, match="ZeRO-3"):
        logits(model, *batch(model, ROWS))


def test_bad_adapters_are_refused(tmp_path: Path) -> None:
    model = experts()
    for name in ("mlp", "a.b", "a b"):
        with pytest.raises(DeloError, match="task's name"):
            model.add_adapter(name, config())
    with pytest.raises(DeloError, match="must agree"):
        model.add_adapter("two", config(pool_size=7))
    assert list(model.peft_config) == ["one"]
    with pytest.raises(DeloError, match="no adapter of this name"):
        save_adapter(model, "two", tmp_path)
    with pytest.raises(DeloError, match="is missing"):
        open_adapters(base(), {"two": tmp_path / "nowhere"}, DeloConfig)
    with pytest.raises(DeloError, match="No adapters"):
        open_adapters(base(), {}, DeloConfig)
    with pytest.raises(DeloError, match="no DeLo experts"):
        tuner(base())
    for options in (
        {"r": 7},
        {"r": 0},
        {"scope": "mine"},
        {"gate": "hard"},
        {"conditional": "x"},
        {"cross_modal": "x"},
    ):
        with pytest.raises(DeloError):
            config(**options)
    with pytest.raises(DeloError, match="linear layers only"):
        get_peft_model(
            base(),
            DeloConfig(target_modules=r"model\.language_model\.norm", hidden_size=64),
            adapter_name="one",
        )


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(experts(), "one", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if "delo_B" in n))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning), pytest.raises(DeloError, match="does not fit"):
        open_adapters(base(), {"one": tmp_path}, DeloConfig)


def test_adapters_can_be_deleted() -> None:
    model = experts(("one", "two"))
    model.delete_adapter("two")
    assert not [n for n, _ in model.named_parameters() if ".two" in n]
    assert logits(model, *batch(model, ROWS)).isfinite().all()
