"""Low-rank pairs: equal to PEFT's LoRA, to a mixture written out row by row, alone as in a batch, and after
their files are read again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from delo_support import COMPLETE, LANGUAGE, NO_IMAGE, NO_TEXT, PROJECTORS, base, batch, changed
from peft import LoraConfig, get_peft_model
from torch import Tensor

from delo_llava.adapters.carrier import routing
from delo_llava.adapters.lowrank import (
    LowRankConfig,
    LowRankLayer,
    RowPlan,
    accumulate,
    inject,
    mixed,
    summed,
)
from delo_llava.adapters.store import open_adapters, save_adapter
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods._lowrank import activate

R = 4
ROWS = [COMPLETE, NO_IMAGE, NO_TEXT, COMPLETE]


def config(kind: str = "llava", **changes: Any) -> LowRankConfig:
    projector, pattern, hidden = PROJECTORS[kind]
    options: dict[str, Any] = {"r": R, "alpha": 2.0 * R} | changes
    return LowRankConfig(
        target_modules=LANGUAGE, projector_modules=pattern, projector=projector, hidden_size=hidden, **options
    )


def live(model: Any, seed: int = 0) -> Any:
    """Draw all B, which start at zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lowrank_B" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def masked(layer: LowRankLayer, x: Tensor) -> Tensor:
    """What DAC does: the row's coefficients on the narrow tensor."""
    plan: RowPlan = layer.carrier.current()
    u = layer.down("one", x)
    return layer.up("one", u * plan.at(layer, "c", u))


def by_row(inputs: RouteInputs, queries: Any) -> RowPlan:
    """Coefficients that hang on the row's own query."""
    return RowPlan({"c": 1 + torch.tanh(10 * queries.instruction[:, :R])}, inputs)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_one_pair_is_lora(kind: str) -> None:
    ours = live(inject(base(kind), config(kind), "one"))
    lora = get_peft_model(
        base(kind),
        LoraConfig(r=R, lora_alpha=2 * R, target_modules=f"{LANGUAGE}|{PROJECTORS[kind][1]}"),
        adapter_name="one",
    )
    own = {n.replace("lowrank_", "lora_"): p for n, p in ours.named_parameters() if "lowrank_" in n}
    theirs = {n: p for n, p in lora.named_parameters() if "lora_" in n}
    assert own.keys() == theirs.keys()
    for name, parameter in theirs.items():
        parameter.data.copy_(own[name])
    inputs, _ = batch(ours, [NO_IMAGE, NO_IMAGE])
    losses = [model(**inputs, labels=inputs["input_ids"]).loss for model in (ours, lora)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for name, parameter in own.items():
        grad = theirs[name].grad
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.allclose(parameter.grad, grad, atol=1e-6)


def test_coefficients_act_on_the_rows_they_belong_to() -> None:
    """Every wrapped linear's output against the sum over experts written out in float64."""
    model = live(inject(base(), config(), "one", masked, by_row))
    inputs, route = batch(model, ROWS)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.name, (args[0], out)))
        for layer in layers(model)
    ]
    with torch.no_grad(), routing(model, route) as entered:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    images = route.image_rows.tolist()
    for layer in layers(model):
        x, y = seen[layer.name]
        a, b = (getattr(layer, f"lowrank_{side}")["one"].weight.double() for side in "AB")
        for i in range(len(x)):
            c = entered.plan.values["c"][images[i] if layer.projector else i].double()
            delta = sum(2.0 * c[e] * torch.outer(x[i].double() @ a[e], b[:, e]) for e in range(R))
            expected = layer.base_layer(x[i]).double() + delta
            assert torch.allclose(y[i].double(), expected, atol=1e-5), layer.name


def test_packed_tokens_take_their_images_row() -> None:
    layer = LowRankLayer(torch.nn.Linear(3, 3), None, True)
    inputs = RouteInputs(
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(3, 2, dtype=torch.uint8),
        torch.ones(3, 2, dtype=torch.bool),
        torch.tensor([2, 0]),
        torch.tensor([1, 3]),
        None,
    )
    plan = RowPlan({"c": torch.arange(3.0).view(3, 1)}, inputs)
    assert plan.at(layer, "c", torch.zeros(4, 3)).flatten().tolist() == [2, 0, 0, 0]
    tiles = plan.at(layer, "c", torch.zeros(4, 5, 3))
    assert tiles.shape == (4, 1, 1) and tiles.flatten().tolist() == [2, 0, 0, 0]
    language = LowRankLayer(torch.nn.Linear(3, 3), None, False)
    assert plan.at(language, "c", torch.zeros(6, 3)).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    taken = plan.index_select(torch.tensor([1, 1]))
    assert taken.rows == 2 and taken.values["c"].flatten().tolist() == [1, 1]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_answers_as_it_does_alone(beams: int) -> None:
    model = live(inject(base(), config(), "one", masked, by_row)).eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}

    def generate(rows: list[tuple[bool, bool]], seed: int) -> Tensor:
        inputs, route = batch(model, rows, seed=seed, left=True, answer=False)
        with torch.no_grad(), routing(model, changed(route, expand=beams)):
            return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    together = generate([COMPLETE, NO_IMAGE], 3)
    alone = generate([COMPLETE], 3)
    assert torch.equal(together[:1, : alone.shape[1]], alone)


def test_routers_see_every_token_of_text_and_image() -> None:
    def token_routed(layer: LowRankLayer, x: Tensor) -> Tensor:
        u = layer.down("one", x)
        gate = layer.scores("one", x).softmax(-1).repeat_interleave(R // 2, -1)
        return layer.up("one", u * gate)

    model = live(inject(base(), config(outputs=2), "one", token_routed))
    inputs, _ = batch(model, ROWS)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in layers(model):
        for pair in (layer.lowrank_A, layer.lowrank_B, layer.lowrank_R):
            assert pair["one"].weight.grad.abs().sum() > 0, layer.name
    layer = layers(model)[-1]
    x = torch.randn(2, 3, layer.in_features)
    a, b, w = (getattr(layer, f"lowrank_{s}")["one"].weight.double() for s in "ABR")
    gate = (x.double() @ w.T).softmax(-1)
    expected = sum(2.0 * gate[..., e // 2, None] * (x.double() @ a[e])[..., None] * b[:, e] for e in range(R))
    assert torch.allclose(token_routed(layer, x).double(), expected, atol=1e-6)


def test_earlier_pairs_act_and_stay_frozen(tmp_path: Path) -> None:
    model = live(inject(base(), config(), "one"), 1)
    save_adapter(model, "one", tmp_path)
    both = mixed(open_adapters(base(), {"one": tmp_path}, LowRankConfig), summed)
    both.add_adapter("two", config())
    activate(both, ["one", "two"], train=["two"])
    inputs, _ = batch(both, ROWS)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, both(**inputs).logits), "the new pair adds nothing yet"
    live(both.get_submodule("base_model"), 2)
    trained = {n for n, p in both.named_parameters() if p.requires_grad}
    assert trained and all(".two." in name for name in trained)
    activate(both, ["two"], train=[])
    with torch.no_grad():
        alone = both(**inputs).logits
    assert not any(p.requires_grad for p in both.parameters())
    activate(both, ["one", "two"], train=[])
    with torch.no_grad():
        assert not torch.equal(both(**inputs).logits, alone)


def test_half_precision_keeps_pairs_in_full(tmp_path: Path) -> None:
    model = inject(base(torch_dtype=torch.bfloat16), config(), "one")
    assert {p.dtype for n, p in model.named_parameters() if "lowrank_" in n} == {torch.float32}
    inputs, _ = batch(model, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        assert model(**inputs).logits.dtype == torch.bfloat16


def test_dropout_is_the_configurations() -> None:
    model = live(inject(base(), config(dropout=0.5), "one"))
    inputs, _ = batch(model, [NO_IMAGE])
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(DeloError, match="at least 1"):
        config(r=0)


def test_adapters_put_together_add_what_they_add_apart() -> None:
    """Of different ranks and scales; the caller's random numbers stay as they were."""
    model = inject(base(), config(), "one")
    model.add_adapter("two", config(r=3, alpha=1.0))
    model.add_adapter("new", config())
    live(model)
    activate(model, ["one", "two"], train=[])
    inputs, _ = batch(model, ROWS)
    with torch.no_grad():
        apart = model(**inputs).logits
        before = torch.get_rng_state()
        accumulate(model, ["one", "two"], "both")
        assert torch.equal(before, torch.get_rng_state())
        activate(model, ["both"], train=[])
        assert torch.allclose(apart, model(**inputs).logits, atol=1e-5)
    assert set(model.peft_config) == {"new", "both"} and model.peft_config["both"].r == R + 3
