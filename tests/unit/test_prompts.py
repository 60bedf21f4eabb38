"""Prefix keys and values: attention against a float64 computation, and a whole model that decodes with
them."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from family_support import KINDS
from method_support import START
from torch import Tensor, nn

from delo_llava.adapters import prompts
from delo_llava.adapters.carrier import Carrier, Route, checkpoint_contexts
from delo_llava.adapters.prompts import PrefixPlan, attach_prefixes, prefix_shape
from delo_llava.backbones.base import find_backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch, Collator
from delo_llava.errors import DeloError
from delo_llava.methods.base import Stage
from delo_llava.tasks import Record

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "methods"))
from prefix_small import METHOD as Prefix

#: Two families always; the others by --long.
FAMILIES = [
    pytest.param(kind, marks=() if kind in ("llava", "qwen2_5_vl") else pytest.mark.long) for kind in KINDS
]
ROWS, HEADS, GROUPS, LONG, WIDTH, LENGTH = 2, 4, 2, 5, 8, 3


class Attention(nn.Module):
    """What transformers hands to an attention function."""

    def __init__(self, carrier: Carrier, own: str) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.training = GROUPS, True, False
        self.__dict__["prefix"] = (carrier, 0, own)


def naive(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
    """Softmax attention of each head written out; `seen` is bool ROWS×Q×K over the sequence's own keys."""
    keys, values = (torch.cat([p, own], 2).double() for p, own in zip(prefix, (key, value), strict=True))
    out = torch.zeros(*query.shape, dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(HEADS):
            k, v = keys[row, head // GROUPS], values[row, head // GROUPS]
            scores = query[row, head].double() @ k.T * WIDTH**-0.5
            allowed = torch.cat([torch.ones(query.shape[2], LENGTH, dtype=torch.bool), seen[row]], 1)
            out[row, head] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2)


@pytest.mark.parametrize("queries", [LONG, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_attention_is_over_prefix_and_sequence(queries: int, kind: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, queries, WIDTH)
    key, value = (torch.randn(ROWS, HEADS // GROUPS, LONG, WIDTH) for _ in range(2))
    prefix = tuple(torch.randn(ROWS, HEADS // GROUPS, LENGTH, WIDTH) for _ in range(2))
    seen = torch.ones(ROWS, queries, LONG, dtype=torch.bool).tril(LONG - queries)
    if kind != "none":
        seen[1, :, :2] = False  # padding on the left
        seen[1, :, -1] |= True
    mask = {
        "none": None,
        "bool": seen[:, None],
        "float": torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None],
    }
    carrier = Carrier(lambda inputs, queries: None)
    plan = PrefixPlan({0: prefix[0]}, {0: prefix[1]})
    with carrier.entered(Route(None, plan)):  # type: ignore[arg-type]
        out, _ = prompts._prefixed(
            Attention(carrier, "sdpa"), query, key, value, mask[kind], scaling=WIDTH**-0.5
        )
    assert torch.allclose(out.double(), naive(query, key, value, prefix, seen), atol=1e-6)


def test_rows_of_a_plan_can_be_taken_again() -> None:
    plan = PrefixPlan({0: torch.arange(3.0).view(3, 1, 1, 1)}, {0: torch.zeros(3, 1, 1, 1)})
    twice = plan.index_select(torch.tensor([2, 2, 0]))
    assert twice.rows == 3 and twice.keys[0].flatten().tolist() == [2.0, 2.0, 0.0]


def test_an_attention_that_is_not_known_is_refused() -> None:
    backbone, path = find_backbone(tiny_models.session("llava"))
    base = backbone.load(path, quant="none", device="cpu")
    base.config.get_text_config()._attn_implementation = "flex_attention"
    with pytest.raises(DeloError, match="Prompts do not work"):
        attach_prefixes(base, Carrier(lambda inputs, queries: None))


class Bench:
    """The reference method with a prefix over one tiny family, and a batch of rows of unequal length."""

    def __init__(self, kind: str, folder: Path, attn: str = "auto") -> None:
        from PIL import Image

        picture = folder / "red.png"
        Image.new("RGB", (64, 64), "red").save(picture)
        self.kind = kind
        self.backbone, path = find_backbone(tiny_models.session(kind))
        self.processor = self.backbone.load_processor(path)
        self.method: Any = Prefix(Prefix.Config(), RunConfig(method="delo"), self.backbone)
        torch.manual_seed(1)
        base = self.backbone.load(path, quant="none", device="cpu", attn=attn)
        self.model: Any = self.method.begin(base, Stage(0, "a")).eval()
        self.records = [
            Record("0", "a", "test", picture, "the picture is red", "what color is it", "red"),
            Record("1", "a", "test", None, None, "which shape", "green one"),
            Record("2", "a", "test", picture, None, "what is shown in the picture it shows", "yes"),
        ]

    def batch(self, rows: slice = slice(None), generation: bool = True) -> Batch:
        collate = Collator(self.backbone, self.processor, 512, generation=generation)
        return collate([(record, (True, True)) for record in self.records[rows]])

    def generate(self, rows: slice = slice(None), **options: Any) -> list[list[int]]:
        batch = self.batch(rows)
        beams = options.get("num_beams", 1)
        with torch.no_grad(), self.method.answering(self.model, batch, None, beams) as prompt:
            ids = self.model.generate(
                **prompt.inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
            )
        return ids[:, prompt.skip :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, tmp_path_factory.mktemp(request.param))


def test_a_prefix_changes_answers_and_training_moves_it(bench: Bench) -> None:
    batch = bench.batch(generation=False)
    assert prefix_shape(bench.model).layers == 2
    with torch.no_grad():
        with bench.method.answering(bench.model, batch, None) as prompt:
            led = bench.model(**prompt.inputs).logits
        bench.model.__dict__["carrier"].enabled = lambda: False
        alone = bench.model(**batch.inputs).logits
        bench.model.__dict__["carrier"].enabled = lambda: True
    assert float((led - alone).abs().max()) > 1e-2
    bench.method.loss_sums(bench.model, batch)["answer"].backward()
    gradient = bench.model.get_submodule("pool").prefix.grad
    assert gradient is not None and (gradient.flatten(2).norm(dim=-1) > 0).all(), (
        "keys and values of every layer"
    )
    assert bench.method.weights(START) == {"answer": 1.0}
    bench.model.zero_grad()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_decoding_is_the_same_with_a_cache_and_without_and_in_any_batch(bench: Bench, options: Any) -> None:
    whole = bench.generate(**options)
    assert whole == bench.generate(use_cache=False, **options)
    for row in range(3):
        assert bench.generate(slice(row, row + 1), **options) == whole[row : row + 1]


def test_eager_attention_is_the_same(bench: Bench, tmp_path: Path) -> None:
    assert Bench(bench.kind, tmp_path, attn="eager").generate() == bench.generate()


def test_recomputed_activations_give_the_same_gradient(bench: Bench) -> None:
    batch, pool = bench.batch(generation=False), bench.model.get_submodule("pool")
    bench.method.loss_sums(bench.model, batch)["answer"].backward()
    expected = pool.prefix.grad.clone()
    bench.model.zero_grad()
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts(bench.model)}
    bench.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    bench.model.train()
    try:
        bench.method.loss_sums(bench.model, batch)["answer"].backward()
    finally:
        bench.model.gradient_checkpointing_disable()
        bench.model.eval()
    assert torch.allclose(pool.prefix.grad, expected, atol=1e-6)
    bench.model.zero_grad()
