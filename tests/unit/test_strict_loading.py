"""A published adapter that does not fit, tensor by tensor, is refused by every method."""

from pathlib import Path
from typing import Any, cast

import pytest
import tiny_models
import torch
from method_support import Given, alone
from safetensors.torch import load_file, save_file

from delo_llava.adapters.own import TENSORS
from delo_llava.backbones.base import find_backbone
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Past, Stage
from delo_llava.registry import load_plugin, plugin_names


@pytest.fixture(scope="module", params=plugin_names("method"))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A method, a function that loads a fresh base, and the folder of its first stage's adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ["--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--delo.cross_modal=identity"]
    run = load_config(None, [f"--method={request.param}", "--quant=none", *words])
    backbone, path = find_backbone(tiny_models.session("llava"))
    kind = cast(type[Method], load_plugin("method", request.param))
    method = kind(kind.Config(**run.methods[request.param]), run, backbone)
    base = lambda: backbone.load(path, quant="none", device="cpu")  # noqa: E731
    model = method.begin(base(), Stage(0, "a"))
    method.finish(model, Given(), alone)
    method.save(model, Stage(0, "a"), folder)
    return method, base, folder


def changed(saved: tuple[Any, Any, Path], tmp_path: Path, change: Any) -> str:
    """What loading says once `change` was done to the adapter's tensors."""
    method, base, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(DeloError) as told:
        method.load(base(), {"a": Past(tmp_path)})
    return told.value.render()


def name_of(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "_B." in name or "_B" in name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_tensor_that_does_not_fit_is_named(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    names = sorted(load_file(saved[2] / TENSORS))
    first, other = name_of(dict.fromkeys(names)), names[-1]  # type: ignore[arg-type]

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[first]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first.replace("layers.0", "layers.7")] = tensors[first].clone()

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[other] = torch.zeros(3, 5)

    assert f"{first}: missing" in changed(saved, tmp_path, drop)
    assert "layers.7" in changed(saved, tmp_path, add)
    said = changed(saved, tmp_path, reshape)
    assert "size mismatch" in said or "shape (3, 5)" in said
    assert "does not fit the base model" in said
