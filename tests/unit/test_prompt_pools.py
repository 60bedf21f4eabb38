"""What prompt methods share: positions that stay, files that fit, random numbers that are not used up."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from contract_support import Bench, items, story
from prompts_support import inputs, queries, unit
from safetensors.torch import load_file, save_file

from delo_llava.adapters.carrier import routing
from delo_llava.adapters.own import TENSORS
from delo_llava.errors import DeloError
from delo_llava.features.queries import Queries
from delo_llava.methods._prompts import mean_cosine, present, prompts_of, side_by_side
from delo_llava.methods.base import Past, Stage

NAMES = ("l2p", "dualprompt", "coda_prompt", "rebq", "map_prompts")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_move_no_position(name: str, kind: str) -> None:
    """What the rotary embeddings and the mask of the language model are told is what the base is told."""
    told: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told.append((*kwargs["position_embeddings"], args[0].shape))

    bench = Bench(name, kind)
    batch, base = bench.batch(items("task0")), bench.base()
    prompted = bench.begin(bench.stages()[0])
    for model in (base, prompted):
        model.get_decoder().layers[1].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        base(**batch.inputs)
        with bench.method.answering(prompted, batch, ["task0"] * 4) as prompt:
            prompted(**prompt.inputs)
    (cosine, sine, shape), (led_cosine, led_sine, led_shape) = told
    assert torch.equal(cosine, led_cosine) and torch.equal(sine, led_sine) and shape == led_shape


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_does_not_fit_is_told_by_tensor(name: str, tmp_path: Path) -> None:
    done = story(name).trained[0]
    tensors = load_file(done.folder / TENSORS)
    first = sorted(tensors)[0]
    for change, said in (
        ({first: tensors[first][..., :1].clone()}, f"{first}: shape"),
        ({"more": torch.zeros(1)}, "more: unexpected"),
    ):
        save_file(tensors | change, tmp_path / TENSORS)
        with pytest.raises(DeloError, match=said):
            Bench(name).loaded({"task0": Past(tmp_path)})
    (tmp_path / TENSORS).unlink()
    with pytest.raises(DeloError, match="cannot be read"):
        Bench(name).loaded({"task0": Past(tmp_path)})


@pytest.mark.parametrize("name", NAMES)
def test_counting_and_loading_use_up_no_random_numbers(name: str) -> None:
    bench, told = Bench(name), story(name)
    base = bench.base()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    bench.method.footprint(base)
    bench.method.load(base, told.past(1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_dummy_image_tells_nothing(name: str) -> None:
    asked = queries([(True, True), (True, True)])
    shown = present(asked, torch.tensor([(False, True), (True, False)]))
    assert not shown.image[0].any() and torch.equal(shown.image[1], asked.image[1])
    assert not shown.text[1].any() and torch.equal(shown.text[0], asked.text[0])
    assert torch.equal(shown.instruction, asked.instruction)
    bench = Bench(name)
    model = bench.begin(Stage(0, "task0"))
    plans = [
        bench.method.plan(model, prompts_of(model)(), inputs([(False, True)], "task0"), rows)  # type: ignore[attr-defined]
        for image in (unit(1, 64), unit(1, 64))
        for rows in (
            present(Queries(image, asked.text[:1], asked.instruction[:1]), torch.tensor([(False, True)])),
        )
    ]
    assert all(torch.equal(plans[0].keys[layer], plans[1].keys[layer]) for layer in plans[0].keys)


@pytest.mark.parametrize(
    "words",
    [("l2p", "pool_size"), ("coda_prompt", "components"), ("rebq", "components"), ("map_prompts", "length")],
)
def test_a_size_is_a_positive_number_or_match(words: tuple[str, str]) -> None:
    name, option = words
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Bench(name, **{option: 0})


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda_prompt", "rebq"])
def test_an_encoder_s_queries_can_ask(name: str) -> None:
    """They replace the base's: keys are as wide as they are, and what they say decides."""
    bench = Bench(name, encoder=str(tiny_models.session_clip()))
    method: Any = bench.method
    assert method.capabilities.encoders == (str(tiny_models.session_clip()),)
    assert method.capabilities.chooses_task == (name == "dualprompt"), "the rest of them stays"
    model = bench.begin(Stage(0, "task0"))
    pools = prompts_of(model).trained
    width = method.encoder.width
    assert {p.shape[-1] // width for n, p in pools.named_parameters() if n.endswith("keys")} <= {1, 3}
    batch = bench.batch(items("task0"))
    method.loss_sums(model, batch)["answer"].backward()
    asked = method.encoder.queries(batch)
    plan = method.plan(model, prompts_of(model)(), method.inputs(batch), present(asked, batch.presence))
    with routing(model, method.inputs(batch)) as route, torch.no_grad():
        model(**batch.inputs)
    assert all(torch.equal(route.plan.keys[layer], plan.keys[layer]) for layer in plan.keys)


def test_a_row_without_any_view_has_the_score_zero() -> None:
    nothing = Queries(*(torch.zeros(1, 4) for _ in range(3)))
    assert mean_cosine(nothing, torch.randn(3, 3, 4)).tolist() == [[0.0] * 3]


def test_prompts_side_by_side_keep_layers_parts_and_heads_apart() -> None:
    rows, count, layers, heads, length, width = 2, 3, 4, 2, 2, 5
    prompts = torch.randn(rows, count, layers, 2, heads, length, width)
    whole = side_by_side(prompts)
    for row in range(rows):
        for place in range(count):
            span = slice(place * length, (place + 1) * length)
            assert torch.equal(whole[row, :, :, :, span], prompts[row, place])


def test_earlier_prompts_are_in_no_optimiser_and_in_no_gradient() -> None:
    told = story("coda_prompt")
    prompts = prompts_of(told.trained[1].model)
    assert not list(prompts.earlier.parameters()) and list(prompts.trained.parameters())
