"""What every method must do, on every model family; a new method is covered as soon as its file exists."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import training_support as support
from contract_support import CORE, TASKS, Bench, Story, hashes, items, recipe, records, story
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from delo_llava.adapters.own import TENSORS
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Past, Stage
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.runs.export import merge
from delo_llava.runs.job import make_job

METHODS = plugin_names("method")
#: One tower, a picture of any size, tiles.
FAMILIES = ("llava", "qwen2_5_vl", "llava_next")
CASES = [
    pytest.param(name, kind, marks=() if kind == "llava" and name in CORE else pytest.mark.long)
    for name in METHODS
    for kind in FAMILIES
]


def every(test: Any) -> Any:
    """For every method on every family."""
    return pytest.mark.support("{kind}")(pytest.mark.parametrize(("name", "kind"), CASES)(test))


#: Column of the table of support -> quantisation and further words.
BITS = {"4 bit": ("nf4",), "16 bit": ("none", "--dtype=bfloat16")}


def of_methods(names: Sequence[str]) -> pytest.MarkDecorator:
    """For some methods, of which the core is always tried."""
    params = [pytest.param(name, marks=() if name in CORE else pytest.mark.long) for name in names]
    return pytest.mark.parametrize("name", params)


every_method = of_methods(METHODS)
MIXED = [*items("task0")[:2], *items("task1")[1:3], items("task0")[3]]


def method_class(name: str) -> type[Method]:
    """A method by its name."""
    found: Any = load_plugin("method", name)
    return found  # type: ignore[no-any-return]


def finished(name: str, kind: str = "llava", *more: str) -> tuple[Story, Any]:
    """A method's story and the model that answers after it."""
    told = story(name, kind, *more)
    return told, told.bench.loaded(told.past(len(told.stages)))


def rows_of(told: Story) -> list[Any]:
    """Rows that one call of the method may answer together."""
    return items("task0") if told.bench.method.capabilities.needs_task else MIXED


# ---- training ----
@every
def test_a_stage_starts_from_what_stands(name: str, kind: str) -> None:
    """At the start of the first one, that is the base, unless no start of the method is neutral."""
    told = story(name, kind)
    if not told.stages:
        pytest.skip("it has no stage")
    bench = told.bench
    start = bench.begin(told.stages[0]).eval()
    rows = items("task0")
    begun = bench.logits(start, rows, trained=True)
    with torch.no_grad():
        base = bench.base()(**bench.batch(rows).inputs).logits
    assert torch.allclose(begun, base, atol=1e-5) == bench.method.capabilities.starts_as_base


@every
def test_all_that_is_declared_to_train_changes_and_nothing_else(name: str, kind: str) -> None:
    """In every task; that the frozen parameters keep their bits, `fit` proves itself, and is made to fail
    here.
    """
    told = story(name, kind)
    for done in told.trained:
        assert done.start.keys() == done.end.keys() and done.start
        still = [n for n, before in done.start.items() if torch.equal(before, done.end[n])]
        assert not still, "these never got a gradient"
        assert not any(".base_layer." in n or n.endswith("lm_head.weight") for n in done.start)
    base = {n.replace(".base_layer", ""): p for n, p in told.bench.base().named_parameters()}
    for done in told.trained:
        model = {n.replace(".base_layer", ""): p for n, p in done.model.named_parameters()}
        for known, value in base.items():
            found = model.get(known, model.get(f"base_model.model.{known}"))
            assert found is not None and torch.equal(found, value), known


@every
def test_files_of_a_stage_hold_all_of_it_and_stay(name: str, kind: str) -> None:
    """A reload answers with the same bits as the model that was trained; later stages rewrite nothing."""
    told = story(name, kind)
    for index, done in enumerate(told.trained):
        assert hashes(done.folder) == done.hashes
        kinds = {file.rpartition(".")[2] for file in done.hashes}
        assert TENSORS in done.hashes and kinds <= {"safetensors", "json"}
        loaded = told.bench.loaded(told.past(index + 1))
        rows = items(told.stages[index].tasks[0].name)
        if told.bench.method.capabilities.answers_as_trained:
            inside = told.bench.logits(done.model, rows, trained=True)
            assert torch.equal(inside, told.bench.logits(loaded, rows))
        stored = load_file(done.folder / TENSORS)
        assert all(torch.isfinite(t).all() for t in stored.values() if t.is_floating_point())


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_method
def test_a_published_tensor_that_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    told = story(name)
    if not told.stages:
        pytest.skip("it has no stage")
    stage, published = told.stages[0], told.trained[0].folder
    names = sorted(load_file(published / TENSORS))
    first, last = next((n for n in names if "_B" in n), names[0]), names[-1]
    added = first.replace("layers.0", "layers.7") if "layers.0" in first else f"{first}_7"

    def refusal(change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        for file in published.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / TENSORS)
        change(tensors)
        save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
        with pytest.raises(DeloError) as refused:
            told.bench.loaded({stage.name: Past(tmp_path, stage.tasks)})
        return refused.value.render()

    assert f"{first}: missing" in refusal(lambda tensors: tensors.pop(first))
    assert added in refusal(lambda tensors: tensors.update({added: tensors[first].clone()}))
    reshaped = refusal(lambda tensors: tensors.update({last: torch.zeros(3, 5)}))
    assert "size mismatch" in reshaped or "shape (3, 5)" in reshaped
    assert "not fit" in reshaped


@every_method
def test_what_a_stage_trains_answers_for_its_own_tasks_alone_where_that_is_said(name: str) -> None:
    told = story(name)
    if len(told.stages) < 2:
        pytest.skip("it has one stage")
    rows = items("task0")
    after = [told.bench.logits(told.bench.loaded(told.past(count)), rows) for count in (1, 2)]
    assert torch.equal(*after) == told.bench.method.capabilities.isolated


@every_method
def test_recomputed_activations_change_nothing(name: str) -> None:
    plain, again = story(name), story(name, "llava", "none", "--train.gradient_checkpointing=true")
    for one, other in zip(plain.trained, again.trained, strict=True):
        for key, value in one.end.items():
            assert torch.allclose(value, other.end[key], atol=1e-6), key


@pytest.mark.support("{bits}")
@pytest.mark.parametrize("bits", BITS)
@every_method
def test_layers_are_the_method_s_own_in_four_and_sixteen_bits(name: str, bits: str) -> None:
    full, quantised = story(name), story(name, "llava", *BITS[bits])
    assert [done.own for done in full.trained] == [done.own for done in quantised.trained]
    for one, other in zip(full.trained, quantised.trained, strict=True):
        assert {n: t.shape for n, t in one.end.items()} == {n: t.shape for n, t in other.end.items()}
        assert all(not torch.equal(before, other.end[n]) for n, before in other.start.items())


@pytest.mark.support("{bits}")
@pytest.mark.parametrize("bits", BITS)
@every_method
def test_adapters_stay_fp32_and_answers_come_in_the_numbers_of_the_base(name: str, bits: str) -> None:
    """On a GPU the base is bfloat16: wherever its numbers meet an adapter's, they must be made to fit."""
    told, model = finished(name, "llava", *BITS[bits])
    assert all(value.dtype == torch.float32 for done in told.trained for value in done.end.values())
    logits = told.bench.logits(model, rows_of(told))
    assert logits.dtype == (torch.float32 if bits == "4 bit" else torch.bfloat16)
    assert bool(logits.isfinite().all())
    told.bench.answers(model, rows_of(told), tokens=2)


# ---- answers ----
@every_method
def test_the_bare_base_answers_before_any_training(name: str) -> None:
    bench = Bench(name)
    rows = items("task0")
    told, model = bench.batch(rows, generation=True), bench.loaded({})
    with torch.no_grad(), bench.method.answering(model, told, None) as prompt:
        out = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)
        alone = bench.base().generate(**told.inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(out[:, prompt.skip :], alone[:, told.inputs["input_ids"].shape[1] :])


@pytest.mark.support("beams")
@every
@pytest.mark.parametrize("beams", [1, 2])
def test_a_row_is_answered_alike_in_any_company(name: str, kind: str, beams: int) -> None:
    """Alone, with others, in another order, padded on the left; rows of several tasks too."""
    told, model = finished(name, kind)
    rows = rows_of(told)
    whole = told.bench.answers(model, rows, beams)
    assert told.bench.answers(model, rows[::-1], beams) == whole[::-1]
    for row, expected in zip(rows, whole, strict=True):
        assert told.bench.answers(model, [row], beams) == [expected]


@every
def test_what_is_missing_is_not_seen(name: str, kind: str) -> None:
    told, model = finished(name, kind)
    one, other = items("task0")[1][0], records("task0")[3]
    seen = replace(one, context="something else that nobody may read")
    image = replace(one, image=other.image)
    for changed, presence in ((seen, (True, False)), (image, (False, True))):
        rows = [[(record, presence)] for record in (one, changed)]
        assert torch.equal(*(told.bench.logits(model, r) for r in rows))
    whole = [[(record, (True, True))] for record in (one, image)]
    assert not torch.equal(*(told.bench.logits(model, r) for r in whole)), "where it is there, it is seen"


@of_methods([n for n in METHODS if method_class(n).capabilities.chooses_task])
@pytest.mark.parametrize("views", [None, ("image", "text")])
def test_a_choice_is_per_sample_and_among_trained_tasks(name: str, views: Any) -> None:
    told = story(name)
    for count in range(1, len(told.stages) + 1):
        model = told.bench.loaded(told.past(count))
        batch = told.bench.batch(items("task0"), generation=True)
        choice = told.bench.method.choose(model, batch, views)
        assert choice is not None and choice.tasks == TASKS[:count]
        assert choice.index.shape == (4,) and choice.scores.shape == (4, count)
        for row, item in enumerate(items("task0")):
            alone = told.bench.batch([item], generation=True)
            single = told.bench.method.choose(model, alone, views)
            assert single is not None and torch.allclose(single.scores[0], choice.scores[row], atol=1e-5)


@pytest.mark.support("merge")
@pytest.mark.parametrize("quant", ["none", "nf4"])
@every_method
def test_the_merged_model_answers_as_the_unmerged_one(name: str, quant: str, tmp_path: Path) -> None:
    """From a plain folder, by transformers alone; a method that cannot be merged says why."""
    told = story(name, "llava", quant)
    method, past = told.bench.method, told.past(len(told.stages))
    if not method.capabilities.mergeable:
        with pytest.raises(DeloError, match="cannot be merged") as refusal:
            merge(method, told.bench.path, past, torch.float32, "trained", "cpu")
        pytest.skip(refusal.value.message)
    if not told.stages:
        pytest.skip("it has no stage")
    merged = merge(method, told.bench.path, past, torch.float32, "trained", "cpu")
    merged.model.save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not [n for n, m in stock.named_modules() if type(m).__module__.startswith(("delo_llava", "peft"))]
    unmerged, inputs = told.bench.loaded(past), told.bench.batch(MIXED).inputs
    with torch.no_grad():
        found, base = (model(**inputs).logits for model in (stock, told.bench.base()))
    expected = told.bench.logits(unmerged, MIXED)
    assert torch.allclose(found, expected, atol=1e-4)
    assert (base - expected).abs().max() > 1e-2, "and it is not the base"


# ---- size ----
@every_method
def test_a_footprint_is_what_is_trained(name: str) -> None:
    told = story(name)
    for done in told.trained[:1]:
        told_size = Bench(name).method.footprint(Bench(name).base()).parameters
        assert told_size == sum(t.numel() for t in done.end.values())


def test_the_baselines_match_delo_s_trainable_parameters() -> None:
    def trainable(name: str, **options: Any) -> int:
        model = Bench(name, **options).begin(Stage(0, "task0"))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    per_rank = trainable("individual", rank=1)
    for name in ("lora", "individual"):
        assert abs(trainable(name) - trainable("delo")) <= per_rank / 2 + 1


def test_what_a_method_cannot_work_with_is_refused_before_loading(tmp_path: Path) -> None:
    words = support.words(recipe(), tiny_models.session("llava"), tmp_path / "run")
    config = load_config(None, [*words, "--method=delo", "--delo.conditional=factor", "--zero=3"])
    with pytest.raises(DeloError, match=r"`delo` does not work with --zero 3: conditional=factor"):
        make_job(config)
    assert make_job(config.model_copy(update={"zero": "2"})).method.refuses().keys() == {"zero=3"}
