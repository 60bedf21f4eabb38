"""A saved stage as a model of lmms-eval: against the real package, or the part of 0.7.3 that is used."""

import importlib.util
import sys
from abc import ABC
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_support import Chooser, little_recipe, make_run, predictions  # noqa: F401

from delo_eval.harness import model as model_module
from delo_eval.harness.folder import Request
from delo_eval.harness.stage import evaluate_stage
from delo_llava.errors import DeloError
from delo_llava.methods.individual import Individual
from delo_llava.methods.lora import Lora
from delo_llava.registry import load_plugin


class Interface(ABC):  # noqa: B024
    """`lmms_eval.api.model.lmms` of 0.7.3, as far as a simple model meets it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}
        self.cache_dict: dict[str, Any] = defaultdict(dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        words = dict(word.split("=", 1) for word in arg_string.split(","))
        return cls(**words, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass(frozen=True)
class Manifest:
    """`lmms_eval.models.registry_v2.ModelManifest` of 0.7.3."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    """`lmms_eval.api.instance.Instance`, as far as a model reads it."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def lmms() -> Iterator[Any]:
    """The adapter's module."""
    patch = pytest.MonkeyPatch()
    if importlib.util.find_spec("lmms_eval") is None:
        for name, content in {
            "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Interface},
            "lmms_eval.models": {}, "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        }.items():  # fmt: skip
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
    yield importlib.import_module("delo_eval.harness.lmms")
    sys.modules.pop("delo_eval.harness.lmms")
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("lmms") / "run", recipe, "individual", Individual, 2)


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """lmms-eval's `task_dict`: task -> split -> documents, as a data set gives them."""
    random = np.random.default_rng(1)
    pictures = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    rows = [{"image": picture, "asked": f"what is shown ? {i}"} for i, picture in enumerate(pictures)]
    return {"shown": {"test": [*rows, {"image": None, "asked": "capital of africa ?"}]}}


def asked(documents: dict[str, Any], second: Any) -> list[Instance]:
    def visual(document: dict[str, Any]) -> list[Any]:
        return [document["image"]] if document["image"] else []

    rows = documents["shown"]["test"]
    return [
        Instance((f"<image>\n{r['asked']}", second, visual, i, "shown", "test")) for i, r in enumerate(rows)
    ]


def made(lmms: Any, documents: dict[str, Any], words: str, batch_size: int = 2) -> Any:
    model = lmms.DeloLlava.create_from_arg_string(words, {"batch_size": batch_size, "device": "cpu"})
    model.task_dict = documents
    return model


def test_it_is_registered_under_its_name(lmms: Any) -> None:
    found = lmms.manifest()
    assert found.model_id == "delo_llava" and found.simple_class_path == "delo_eval.harness.lmms.DeloLlava"
    assert lmms.DeloLlava.is_simple and not getattr(lmms.DeloLlava, "__abstractmethods__", None)


def test_answers_do_not_depend_on_the_batch_and_end_where_they_should(
    lmms: Any, run: Path, documents: dict[str, Any]
) -> None:
    settings = {"max_new_tokens": 6, "until": ["\n\n"], "temperature": 0.0, "do_sample": False}
    many = made(lmms, documents, f"run={run},stage=1,task=words", 5).generate_until(
        asked(documents, settings)
    )
    one = made(lmms, documents, f"run={run},stage=words,task=words", 1)
    assert one.generate_until(asked(documents, settings)) == many and len(set(many)) > 1
    other = made(lmms, documents, f"run={run},stage=last,task=shapes").generate_until(
        asked(documents, settings)
    )
    assert other != many
    word = many[0].split()[-1]
    assert (
        one.generate_until(asked(documents, {**settings, "until": word}))[0] == many[0].split(word)[0].strip()
    )
    with pytest.raises(DeloError, match="sampled"):
        one.generate_until(asked(documents, {"temperature": 0.7}))
    one.clean()
    assert not one._folder.exists()


def test_its_answers_are_those_of_the_harness(
    lmms: Any,
    run: Path,
    recipe: Path,
    tmp_path: Path,
) -> None:
    evaluate_stage(
        run, 1, request=Request(output=tmp_path, patterns=("text",))
    )  # no context, as lmms-eval has none
    rows = predictions(tmp_path, 1, "text")["words"]
    picture = Image.open(next(recipe.parent.rglob("picture.png")))
    document = {"image": picture, "asked": "what card says ?"}
    model = made(lmms, {"shown": {"test": [document]}}, f"run={run},stage=1,task=words")
    (said,) = model.generate_until(asked(model.task_dict, {"max_new_tokens": 3}))
    assert {row["prediction"] for row in rows} == {said}


def test_the_likelihood_is_that_of_one_token_after_the_other(
    lmms: Any, run: Path, documents: dict[str, Any]
) -> None:
    model = made(lmms, documents, f"run={run},stage=1,task=words", 3)
    texts = ["mango", "red circle"]
    found = {text: model.loglikelihood(asked(documents, text)) for text in texts}
    assert model.loglikelihood(asked(documents, lambda document: "mango")) == found["mango"]
    ready = model._ready
    for text in texts:
        for place in (0, 4):  # with and without an image
            question = model._question(asked(documents, {})[place].args)
            batch = ready.collate([(question.record, question.presence)])
            inputs, total, greedy = dict(batch.inputs), 0.0, True
            ids = ready.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            with torch.inference_mode(), ready.method.answering(ready.model, batch, ["words"]):
                for token in ids:
                    scores = ready.model(**inputs).logits[0, -1].log_softmax(-1)
                    total += float(scores[token])
                    greedy &= int(scores.argmax()) == token
                    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
                    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            assert found[text][place] == (pytest.approx(total, abs=1e-4), greedy)


def test_the_method_chooses_unless_told(
    lmms: Any, run: Path, documents: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeloError, match=r"cannot choose(.|\n)*task="):
        made(lmms, documents, f"run={run},stage=1")
    monkeypatch.setattr(
        model_module, "load_plugin", lambda k, n: Chooser if k == "method" else load_plugin(k, n)
    )
    settings = {"max_new_tokens": 6}
    free = made(lmms, documents, f"run={run},stage=1")
    told = made(lmms, documents, f"run={run},stage=1,task=shapes")
    # The chooser does not know lmms-eval's task, so it takes the first of its own.
    assert free.generate_until(asked(documents, settings)) == told.generate_until(asked(documents, settings))
    assert free.loglikelihood(asked(documents, "mango")) == told.loglikelihood(asked(documents, "mango"))


def test_bad_arguments_are_told(
    lmms: Any, run: Path, documents: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeloError, match="not trained on that task"):
        made(lmms, documents, f"run={run},stage=0,task=words")
    with pytest.raises(DeloError, match="One stage"):
        made(lmms, documents, f"run={run},stage=all,task=words")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeloError, match="one process"):
        made(lmms, documents, f"run={run},stage=1,task=words")


def test_a_method_without_tasks_needs_none(
    lmms: Any,
    recipe: Path,
    documents: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run", recipe, "lora", Lora, 1)
    model = made(lmms, documents, f"run={folder},stage=last")
    assert len(model.generate_until(asked(documents, {"max_new_tokens": 3}))) == 5
    assert len(model.loglikelihood(asked(documents, "mango"))) == 5
