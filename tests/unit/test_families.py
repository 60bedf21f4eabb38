"""What every model family must show (specification of backbones, section 1), on tiny random models."""

import re
from collections.abc import Iterator

import pytest
import tiny_models
import torch
from family_support import KINDS, batch, experts, items, loaded, logits, loss
from torch import Tensor

from delo_llava.adapters.carrier import carrier_of, frozen_queries, routing
from delo_llava.backbones import _quant
from delo_llava.backbones.base import adapted_linears
from delo_llava.data.collate import SEGMENT_IMAGE, Collator
from delo_llava.engines.dummy_image import DummyImage
from delo_llava.features.inputs import RouteInputs
from delo_llava.runs.stage import checkpoint_activations

#: Tiny models of families that share all their code with another one.
TWINS = ("qwen2_vl", "qwen3_vl_moe", "idefics3", "paligemma2")
EACH = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] if kind in TWINS else []) for kind in KINDS]
)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

#: Linears of the language layers that are adapted, where they are not seven in each of two layers.
LANGUAGE = {"qwen3_vl_moe": 8}


@EACH
def test_what_is_adapted_lies_where_the_family_says(kind: str) -> None:
    backbone, model, parts = loaded(kind)
    found = adapted_linears(model, backbone)
    language = [name for name in found if re.fullmatch(backbone.language_pattern, name)]
    assert len(language) == LANGUAGE.get(kind, 14)
    assert len(found) > len(language), "the projector has a linear"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    known = parts.tokenizer.convert_tokens_to_ids(backbone.image_token)
    assert backbone.image_token_id(model) == known
    assert backbone.projector(model) is model.get_submodule(backbone.projector_name)


@EACH
def test_a_batch_says_what_the_projector_gives(kind: str) -> None:
    """Units along its output's first dimension; of its outputs, those that are kept are image tokens, besides
    vectors for line ends and what is shrunk."""
    backbone, model, _ = loaded(kind)
    given = batch(kind)
    seen: list[Tensor] = []
    hook = backbone.projector(model).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(**given.inputs)
    hook.remove()
    assert len(seen) == 1 and len(seen[0]) == int(given.image_units.sum())
    tokens = seen[0].shape[:-1].numel()
    counts = (given.segments == SEGMENT_IMAGE).sum(1)
    assert counts.bool().tolist() == [True] * 4 + [False] * 2
    if given.image_kept is None:
        assert counts[given.image_rows].tolist() == (given.image_units * (tokens // len(seen[0]))).tolist()
    else:
        assert given.image_kept.shape == (tokens,) and 0 < int(given.image_kept.sum()) < tokens


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_what_is_kept_is_what_the_language_model_sees(kind: str) -> None:
    """Every kept output of the projector is among the features that the model lays into the prompt, in order,
    as long as it shrinks nothing, and no other is."""
    backbone, model, parts = loaded(kind)
    for item in items()[:3]:
        given = batch(kind, [item])
        seen: list[Tensor] = []
        hook = backbone.projector(model).register_forward_hook(lambda m, a, out: seen.append(out))  # noqa: B023
        visual = {key: given.inputs[key] for key in ("pixel_values", "image_sizes")}
        with torch.no_grad():
            laid = model.get_image_features(**visual).pooler_output[0]
        hook.remove()
        ends = (laid == model.model.image_newline).all(-1)
        flat = seen[0].flatten(0, 1)
        whole = flat.shape[0] // len(seen[0])
        order = laid[~ends]
        assert torch.equal(order[:whole], flat[:whole])
        assert given.image_kept is not None and len(order) == int(given.image_kept.sum())
        assert {tuple(row) for row in order.tolist()} == {tuple(r) for r in flat[given.image_kept].tolist()}


@EACH
@pytest.mark.parametrize("generation", [False, True])
def test_a_row_alone_equals_the_row_in_a_batch(kind: str, generation: bool) -> None:
    _, model, _ = loaded(kind)
    given = batch(kind, generation=generation)
    with torch.no_grad():
        together = model(**given.inputs).logits
        for row, item in enumerate(items()):
            alone = model(**batch(kind, [item], generation).inputs).logits[0]
            seen = given.inputs["attention_mask"][row].bool()
            assert (together[row][seen] - alone).abs().max() <= 1e-4, row


@EACH
def test_experts_begin_as_the_base_and_route_by_frozen_queries(kind: str) -> None:
    _, base, _ = loaded(kind)
    given = batch(kind)
    route = RouteInputs.from_batch(given)
    fresh, acting = experts(kind, live=False), experts(kind)
    with torch.no_grad():
        plain = base(**given.inputs).logits
        seen = given.inputs["attention_mask"].bool()
        assert torch.equal(logits(fresh, given)[seen], plain[seen])
        with routing(acting, route) as entered:
            changed = acting(**given.inputs).logits
        for early, late in zip(
            frozen_queries(acting, route, given.inputs), entered.plan.queries, strict=True
        ):
            assert torch.equal(early, late)
        assert ((changed - plain)[seen].abs().amax() > 1e-3).all()
    assert entered.plan.queries.image.abs().sum(1).bool().tolist() == [True] * 4 + [False] * 2


@EACH
def test_experts_of_a_row_do_not_depend_on_the_batch(kind: str) -> None:
    model = experts(kind).eval()
    given = batch(kind)
    with torch.no_grad():
        together = logits(model, given)
        for row in (2, 4):
            alone = logits(model, batch(kind, [items()[row]]))[0]
            seen = given.inputs["attention_mask"][row].bool()
            assert (together[row][seen] - alone).abs().max() <= 1e-4


def trained(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@EACH
def test_every_pool_learns_nothing_else_does_and_recomputation_changes_nothing(kind: str) -> None:
    given, found = batch(kind), []
    for recompute in (False, True):
        model = experts(kind)
        model.get_base_model().config.get_text_config().use_cache = False
        if recompute:
            checkpoint_activations(model.get_base_model(), model, _Delo)
        loss(model.train(), given).backward()
        assert all("delo_" in name for name, _ in trained(model))
        grads = {name: p.grad for name, p in trained(model) if "delo_A" in name or "delo_B" in name}
        assert all(grad is not None and bool((grad != 0).any()) for grad in grads.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append(grads)
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-6), name


class _Delo:
    """What recomputation asks a method for."""

    @staticmethod
    def checkpoint_context_fn(model: torch.nn.Module) -> object:
        return carrier_of(model).checkpoint_contexts


def generated(kind: str, model: object, rows: list, beams: int, **options: object) -> list[list[int]]:
    """Ids of the answers, without what random models like to say."""
    given = batch(kind, rows, generation=True)
    with torch.no_grad(), routing(model, RouteInputs.from_batch(given, expand=beams)):
        ids = model.generate(
            **given.inputs, max_new_tokens=5, min_new_tokens=5, num_beams=beams, do_sample=False,
            suppress_tokens=suppressed(kind, given.inputs["input_ids"]), **options,
        )  # fmt: skip
    return ids[:, given.inputs["input_ids"].shape[1] :].tolist()


def suppressed(kind: str, ids: Tensor) -> list[int]:
    """The image token, and the prompt's last one: with tied embeddings it would be said again and again."""
    backbone, base, _ = loaded(kind)
    return [backbone.image_token_id(base), int(ids[0, -1])]


@EACH
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_in_batches_are_those_of_single_rows(kind: str, beams: int) -> None:
    model = experts(kind).eval()
    rows = [items()[i] for i in (1, 2, 4, 5)]
    single = [generated(kind, model, [row], beams)[0] for row in rows]
    assert generated(kind, model, rows, beams) == single
    assert len({tuple(answer) for answer in single}) > 1
    assert generated(kind, model, rows[2:], beams) == single[2:], "text only"
    if beams == 1 and not kind.startswith("paligemma"):
        # Without a cache, PaliGemma's new tokens would be a prompt's.
        assert generated(kind, model, rows[:1], 1, use_cache=False) == single[:1]


@EACH
def test_the_training_form_predicts_what_is_generated(kind: str) -> None:
    """So masks, positions and token types of training are those of answering."""
    backbone, base, _ = loaded(kind)
    model = experts(kind).eval()
    for row in (items()[1], items()[5]):
        answer = generated(kind, model, [row], 1)[0]
        prompt = batch(kind, [row], generation=True)
        length = prompt.inputs["input_ids"].shape[1]
        ids = torch.cat([prompt.inputs["input_ids"], torch.tensor([answer])], 1)
        segments = torch.nn.functional.pad(prompt.segments, (0, len(answer)))
        answers = torch.arange(ids.shape[1])[None] >= length
        whole = prompt.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole |= backbone.sequence_inputs(segments, answers)
        route = RouteInputs(
            ids, segments, prompt.presence, prompt.image_rows, prompt.image_units, prompt.image_kept
        )
        with torch.no_grad(), routing(model, route):
            said = model(**whole).logits[0, length - 1 : -1]
        said[:, [*suppressed(kind, prompt.inputs["input_ids"]), *_ends(base)]] = -torch.inf
        assert said.argmax(-1).tolist() == answer


def _ends(model: object) -> list[int]:
    """Tokens that `min_new_tokens` keeps from being said."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


@EACH
def test_4_bit_takes_exactly_the_language_linears(kind: str) -> None:
    backbone, _, _ = loaded(kind)
    model = backbone.load(str(tiny_models.session(kind)), quant="nf4", device="cpu")
    found = set(_quant.quantised_linears(model))
    assert found == {
        n for n in adapted_linears(model, backbone) if re.fullmatch(backbone.language_pattern, n)
    }
    assert len(found) == LANGUAGE.get(kind, 14)
    value = loss(experts(kind, model).train(), batch(kind))
    value.backward()
    assert bool(value.isfinite())


@EACH
def test_bf16_trains(kind: str) -> None:
    backbone, _, _ = loaded(kind)
    base = backbone.load(str(tiny_models.session(kind)), quant="none", device="cpu", dtype="bfloat16")
    model = experts(kind, base).train()
    value = loss(model, batch(kind))
    value.backward()
    assert bool(value.isfinite())
    pools = [p for name, p in trained(model) if "delo_B" in name]
    assert all(p.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in pools)


@EACH
def test_a_forward_without_pictures_can_take_a_dummy(kind: str) -> None:
    """As ZeRO-3 needs it: the projector's experts get a gradient, which is zero, and nothing else changes."""
    backbone, _, parts = loaded(kind)
    given = batch(kind, items()[4:])
    found = []
    for with_dummy in (False, True):
        model = experts(kind).train()
        dummy = DummyImage(model, backbone.tiny_image(parts)) if with_dummy else None
        value = loss(model, given)
        value.backward()
        if dummy is not None:
            dummy.remove()
        grads = {name: p.grad for name, p in trained(model)}
        found.append((float(value), grads))
    inside = [name for name in found[0][1] if backbone.projector_name in name]
    assert inside and found[0][0] == found[1][0]
    for name, grad in found[1][1].items():
        if name in inside:
            assert grad is not None and not bool(grad.any()), name
        elif found[0][1][name] is not None:
            assert torch.equal(grad, found[0][1][name]), name


@EACH
def test_a_dummy_picture_for_what_is_missing_is_fed_and_flagged(kind: str) -> None:
    backbone, model, parts = loaded(kind)
    given = Collator(backbone, parts, 2048, "dummy")(items()[3:5])
    assert given.presence[:, 0].tolist() == [True, False] and given.image_rows.tolist() == [0, 1]
    with torch.no_grad():
        assert bool(model(**given.inputs, labels=given.labels).loss.isfinite())
