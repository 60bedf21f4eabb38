"""Sequences longer than the base has positions for are refused before its weights load; defaults give way."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support
from transformers import Gemma3Config, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

from delo_llava import cli
from delo_llava.backbones.base import Backbone
from delo_llava.cluster.plan import Job as Planned
from delo_llava.cluster.plan import make_plan
from delo_llava.errors import DeloError
from delo_llava.runs.job import Job, make_job
from delo_llava.runs.positions import positions


def llama(**rope: Any) -> LlavaConfig:
    rotary = {"rope_theta": 10000.0, "rope_type": "default", **rope}
    return LlavaConfig(text_config=LlamaConfig(max_position_embeddings=4096, rope_parameters=rotary))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (llama(), 4096),
        (llama(rope_type="linear", factor=4.0), 16384),
        (llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048), 8192),
        (llama(rope_type="dynamic", factor=2.0), 8192),
        (
            llama(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=1024,
            ),
            4096,
        ),
        (Qwen2_5_VLConfig(text_config={"max_position_embeddings": 777}), 777),
        (Gemma3Config(text_config={"max_position_embeddings": 888}), 888),
    ],
    ids=["plain", "linear", "yarn", "dynamic", "llama3", "qwen2_5_vl", "gemma3"],
)  # fmt: skip
def test_positions_are_those_of_the_language_part_as_it_stretches_them(model: Any, count: int) -> None:
    assert positions(model) == count


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    support.write_sequence(tmp_path, tasks=1)
    return tmp_path


def words(place: Path, *more: str, model: str = "mini-llava") -> list[str]:
    return support.words(place / "tiny.yaml", Path(model), place / "run", *more)


def job(place: Path, *more: str, model: str = "mini-llava") -> Job:
    return make_job(cli.resolve(words(place, *more, model=model)))


def test_what_the_user_asks_for_is_refused_with_a_remedy(place: Path) -> None:
    with pytest.raises(DeloError, match="mini-llava has positions for 512 tokens") as error:
        job(place, "--data.max_length=513")
    assert error.value.fix is not None and "--data.max_length=512" in error.value.fix
    file = place / "run.yaml"
    file.write_text(json.dumps({"data": {"max_length": 2048}}))
    with pytest.raises(DeloError, match="512"):
        make_job(cli.resolve(["--config", str(file), *words(place)]))
    with pytest.raises(DeloError, match="512"):
        make_plan(cli.resolve(words(place, "--data.max_length=513")), Planned(1, 1))
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "check", str(place / "tiny.yaml"), "--model=mini-llava", "--data.max_length=513"])
    assert ended.value.code == 2
    made = job(place, "--data.max_length=512")
    assert (made.config.data.max_length, made.notes) == (512, ())


@pytest.mark.parametrize("recipe", [False, True], ids=["of the code", "of the recipe"])
def test_a_default_gives_way_and_says_so(place: Path, recipe: bool) -> None:
    if recipe:
        content = json.loads((place / "tiny.yaml").read_text())
        (place / "tiny.yaml").write_text(json.dumps(content | {"defaults": {"data": {"max_length": 1024}}}))
    made = job(place)
    told = (
        f"data.max_length is 512 instead of {1024 if recipe else 2048}, as mini-llava has no more positions"
    )
    assert (made.config.data.max_length, made.notes) == (512, (told,))


def test_where_there_are_enough_nothing_is_said(place: Path) -> None:
    made = job(place, model=str(tiny_models.session("llava")))
    assert (made.config.data.max_length, made.notes) == (2048, ())
