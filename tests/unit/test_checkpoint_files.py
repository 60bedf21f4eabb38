"""Checkpoints of another code, or with a file that is absent, cut or a pointer: told before loading."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import training_support as support
from safetensors.torch import load_file, save_file

from delo_llava.backbones._checkpoint import INDEX, SINGLE
from delo_llava.backbones.base import find_backbone
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 14482\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.session("llava"), tmp_path / "model"))


def edit(folder: Path, *removed: str, **added: object) -> None:
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in removed}
    file.write_text(json.dumps(config | added))


def split(folder: Path) -> None:
    """The weights in two files with an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == place}, folder / place)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / SINGLE).unlink()


def lose_a_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def cut_a_shard(folder: Path) -> None:
    split(folder)
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def point(folder: Path) -> None:
    for name in (SINGLE, "tokenizer.json"):
        (folder / name).write_text(POINTER)


def keep_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no weights": (lambda folder: (folder / SINGLE).unlink(), r"model\.safetensors is not there", "again"),
    "a shard that is absent": (lose_a_shard, r"model-00002-of-00002\.safetensors is not there", "again"),
    "weights cut off": (cut, r"weights cannot be loaded", r"model\.safetensors is cut off"),
    "a shard cut off": (cut_a_shard, r"weights cannot be loaded", r"00001-of-00002\.safetensors is cut"),
    "pointers": (point, r"(?s)pointers of Git LFS.*model\.safetensors, tok", "lfs pull"),
    "pickles": (keep_pickles, "they are no safetensors", "save_pretrained"),
    "a damaged index": (lambda folder: (folder / INDEX).write_text("{}"), "index.json is damaged", "again"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_weights_that_are_not_whole_are_told_before_a_run_begins(
    tmp_path: Path, model: Path, name: str
) -> None:
    spoil, told, remedy = FAULTS[name]
    spoil(model)
    recipe = support.write_sequence(tmp_path, tasks=1, records=4)
    with pytest.raises(DeloError, match=told) as error:
        make_job(load_config(None, support.words(recipe, model, tmp_path / "run")))
    assert error.value.fix is not None and re.search(remedy, error.value.fix)
    assert not (tmp_path / "run").exists()


def test_weights_in_several_files_are_whole(tmp_path: Path, model: Path) -> None:
    split(model)
    backbone, path = find_backbone(model)
    assert backbone.load(path, quant="none", device="cpu") is not None


@pytest.mark.parametrize(
    "entries",
    [{"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"},
     {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"},
     {"mm_vision_tower": "openai/clip", "model_type": "llava"}],
)  # fmt: skip
def test_the_original_layout_of_llava_is_recognised(model: Path, entries: dict[str, object]) -> None:
    edit(model, "text_config", "vision_config", **entries)
    with pytest.raises(DeloError, match="original LLaVA code") as error:
        find_backbone(model)
    assert error.value.fix is not None and "llava-hf/" in error.value.fix


def test_a_configuration_without_a_tower_is_refused(model: Path) -> None:
    """Transformers would build the tower of its default, whatever the weights are."""
    edit(model, "vision_config")
    with pytest.raises(DeloError, match="vision_config"):
        find_backbone(model)


@pytest.mark.parametrize(
    ("names", "what"),
    [(("preprocessor_config.json", "processor_config.json"), "image processor"),
     (("tokenizer.json", "tokenizer.model", "tokenizer_config.json"), "tokenizer")],
)  # fmt: skip
def test_a_part_that_is_absent_is_named(model: Path, names: tuple[str, ...], what: str) -> None:
    backbone, path = find_backbone(model)
    for name in names:
        (model / name).unlink(missing_ok=True)
    with pytest.raises(DeloError, match=f"{what} cannot be loaded") as error:
        backbone.load_processor(path)
    assert error.value.given == path and error.value.fix is not None and "not whole" in error.value.fix


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    """Transformers builds an empty one for this family, and says nothing."""
    folder = Path(shutil.copytree(tiny_models.session("qwen2_5_vl"), tmp_path / "qwen"))
    for file in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        file.unlink()
    backbone, path = find_backbone(folder)
    with pytest.raises(DeloError, match=r"tokenizer cannot be loaded: there is none of tokenizer\.json"):
        backbone.load_processor(path)


def test_a_pointer_in_place_of_the_configuration_is_named(model: Path) -> None:
    (model / "config.json").write_text(POINTER)
    with pytest.raises(DeloError, match=r"pointers of Git LFS") as error:
        find_backbone(model)
    assert "config.json" in str(error.value.given)
