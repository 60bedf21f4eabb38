"""Generation: the plan of the prefill serves all decode steps, with and without cache, beams and padding
(invariant 10, M9)."""

from pathlib import Path

import pytest
import torch
from delo_support import COMPLETE, NO_IMAGE, NO_TEXT, batch, changed, config, enliven, experts, tiny_models
from peft import get_peft_model
from PIL import Image

from delo_llava.adapters.carrier import frozen_queries, routing
from delo_llava.backbones.base import find_backbone
from delo_llava.data.collate import Collator
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.tuner import set_trainable
from delo_llava.tasks import Record

ROWS = [COMPLETE, NO_IMAGE, NO_TEXT]
TASKS = ["one", "two", "two"]


@pytest.fixture(scope="module")
def model():
    return experts(("one", "two")).eval()


def generate(model, inputs, route, tokens: int = 6, **options):
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad(), routing(model, route) as entered:
        out = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options
        )
    return out[:, prompt:], entered.plan


@pytest.mark.parametrize("scope", ["own", "all"])
def test_cache_changes_nothing(scope: str) -> None:
    model = experts(("one", "two"), scope=scope).eval()
    inputs, route = batch(model, ROWS, left=True, answer=False)
    route = changed(route, tasks=TASKS)
    assert torch.equal(generate(model, inputs, route)[0], generate(model, inputs, route, use_cache=False)[0])


def test_experts_act_while_decoding(model) -> None:
    """With pools of other values the words differ, so the equalities here are not those of the bare base."""
    inputs, route = batch(model, ROWS, left=True, answer=False)
    one, two = (generate(model, inputs, changed(route, tasks=t))[0] for t in ("one", "two"))
    assert not torch.equal(one, two)


def test_pools_are_read_once_per_generate(model) -> None:
    inputs, route = batch(model, ROWS, left=True, answer=False)
    layer = next(m for m in model.modules() if isinstance(m, DeloLayer) and not m.projector)
    calls = []
    hook = layer.delo_A["one"].register_forward_hook(lambda *_: calls.append(1))
    generate(model, inputs, changed(route, tasks="one"))
    hook.remove()
    assert len(calls) == 2, "once for the prefill, once for the text half of all decode steps"


@pytest.mark.parametrize("beams", [1, 3])
def test_one_row_equals_the_same_row_in_a_batch(model, beams: int) -> None:
    inputs, route = batch(model, ROWS, left=True, answer=False)
    together, _ = generate(model, inputs, changed(route, tasks=TASKS, expand=beams), num_beams=beams)
    images = route.image_rows.tolist()
    for i in range(len(ROWS)):
        mask = inputs["attention_mask"][i].bool()
        one = {
            "input_ids": inputs["input_ids"][i : i + 1, mask],
            "attention_mask": inputs["attention_mask"][i : i + 1, mask],
        }
        rows = torch.zeros(int(i in images), dtype=torch.int64)
        if i in images:
            one["pixel_values"] = inputs["pixel_values"][[images.index(i)]]
        alone = RouteInputs(
            one["input_ids"],
            route.segments[i : i + 1, mask],
            route.presence[i : i + 1],
            rows,
            rows + 1,
            None,
            tasks=TASKS[i],
            expand=beams,
        )
        assert torch.equal(generate(model, one, alone, num_beams=beams)[0][0], together[i])


def test_beams_keep_their_rows_routes(model) -> None:
    inputs, route = batch(model, ROWS, left=True, answer=False)
    _, plain = generate(model, inputs, changed(route, tasks=TASKS), tokens=1)
    _, plan = generate(model, inputs, changed(route, tasks=TASKS, expand=2), tokens=3, num_beams=2)
    rows = torch.arange(3).repeat_interleave(2)
    assert plan.tasks == [TASKS[i] for i in rows]
    assert torch.equal(plan.selection.text_b, plain.selection.text_b[rows])
    shuffled = plan.index_select(torch.tensor([1, 0, 3, 2, 5, 4]))
    assert torch.equal(shuffled.selection.text_b, plan.selection.text_b), (
        "beams trade places within a row only"
    )


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("scope", ["own", "all"])
def test_families_with_real_batches(kind: str, scope: str, tmp_path: Path) -> None:
    """Collated records, images of two sizes: fresh experts change nothing, queries agree, a row does not
    depend
    on the others."""
    backbone, path = find_backbone(tiny_models.session(kind))
    torch.manual_seed(0)
    model = get_peft_model(
        backbone.load(path, quant="none", device="cpu"), config(kind, scope=scope), adapter_name="one"
    ).eval()
    for i, size in enumerate([(64, 64), (120, 60), (64, 64)]):
        Image.effect_noise(size, 60.0 + i).convert("RGB").save(tmp_path / f"{i}.png")
    words = ["the red circle", "a blue square lies in africa", "card says mango"]
    records = [
        Record(str(i), "t", "test", tmp_path / f"{i}.png", w, "what is shown?", "four")
        for i, w in enumerate(words)
    ]
    items = [(records[0], (True, True)), (records[1], (True, False)), (records[2], (False, True))]
    collate = Collator(backbone, backbone.load_processor(path), 512, generation=True)
    together = collate.collate(items)
    route = RouteInputs.from_batch(together)
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(**together.inputs).logits
        with routing(model, route):
            assert torch.equal(model(**together.inputs).logits, plain)
        enliven(model)
        with routing(model, route) as entered:
            moved = model(**together.inputs).logits
    assert (moved - plain).abs().max() > 1e-3
    for early, late in zip(frozen_queries(model, route, together.inputs), entered.plan.queries, strict=True):
        torch.testing.assert_close(early, late, rtol=0, atol=1e-6)
    answers, _ = generate(model, together.inputs, route, tokens=3)
    for i, item in enumerate(items):
        alone = collate.collate([item])
        with torch.no_grad(), routing(model, RouteInputs.from_batch(alone)):
            single = model(**alone.inputs).logits[0]
        torch.testing.assert_close(single, moved[i, -len(single) :], rtol=0, atol=2e-4)
        assert torch.equal(
            generate(model, alone.inputs, RouteInputs.from_batch(alone), tokens=3)[0][0], answers[i]
        )
    set_trainable(model, "one")
    labels = together.inputs["input_ids"]
    with routing(model, route):
        model(**together.inputs, labels=labels).loss.backward()
    assert not [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
