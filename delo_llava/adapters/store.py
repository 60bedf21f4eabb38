"""One stage, one folder: `adapter_config.json` and `adapter_model.safetensors`, as PEFT reads them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delo_llava.adapters.own import TENSORS, require_own_adapter
from delo_llava.errors import DeloError


def save_adapter(model: Any, name: str, folder: Path) -> None:
    """Write one adapter of a PEFT model into `folder`; its tensors must be whole.

    Args:
        name: the adapter's name; the files do not hold it, so it can be loaded under another.
        folder: created if need be.
    """
    if name not in model.peft_config:
        raise DeloError("There is no adapter of this name", given=name, allowed=list(model.peft_config))
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    write_adapter(state, model.peft_config[name], folder)


def write_adapter(tensors: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write an adapter's whole tensors, under the names that PEFT gives them, and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(held, folder / TENSORS, metadata={"format": "pt"})
    trained, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = trained


def open_adapters(
    base: nn.Module,
    folders: Mapping[str, Path],
    kind: type[PeftConfig],
    trainable: bool = False,
    fields: Collection[str] = (),
) -> PeftModel:
    """The base with published adapters, each proven to be this project's and to fit tensor by tensor.

    Args:
        folders: PEFT's name of each adapter -> folder; at least one.
        kind: the configuration that the method writes.
        trainable: go on training it (a single one).
        fields: of one of PEFT's own kinds, those that the method sets besides rank, scale and targets.

    Raises:
        DeloError: no adapter is given, one is missing or not of this project, or does not fit: every
            tensor that is missing, unexpected or of another shape is named.
    """
    if not folders:
        raise DeloError("No adapters to load", given="an empty list of folders", fix="train a stage first")
    for name, folder in folders.items():
        if not (folder / TENSORS).is_file():
            raise DeloError(f"The adapter of {name} is missing", given=folder, fix="train the stage again")
        require_own_adapter(folder, kind, fields)
    (first, first_folder), *others = folders.items()
    # PEFT draws initial weights before it loads; the caller's stream stays as it is.
    with torch.random.fork_rng(devices=[]), _told_by_tensor(folders):
        model = PeftModel.from_pretrained(base, str(first_folder), adapter_name=first, is_trainable=trainable)
        for name, folder in others:
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    for name, folder in folders.items():
        check_complete(model, name, folder)
    return model


@contextmanager
def _told_by_tensor(folders: Mapping[str, Path]) -> Iterator[None]:
    """Turn torch's complaint about shapes, which names every tensor, into an error with a remedy."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise
        raise DeloError(
            "\n".join(["An adapter does not fit the base model:", *(f"  {line}" for line in lines)]),
            given=", ".join(str(folder) for folder in folders.values()),
            fix="use the base and configuration of the run",
        ) from error


def check_complete(model: nn.Module, task: str, folder: Path) -> None:
    """Compare an adapter's file with the model: PEFT only warns of missing tensors, and a half-loaded adapter
    must not answer.

    Raises:
        DeloError: naming each tensor that is missing, unexpected or of another shape.
    """
    expected = get_peft_model_state_dict(model, adapter_name=task, save_embedding_layers=False)
    with safe_open(folder / TENSORS, "pt") as file:
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    report = tensor_report({name: tensor.shape for name, tensor in expected.items()}, found)
    if report:
        raise DeloError(
            "\n".join([f"The adapter {task} does not fit the base model:", *report]),
            given=folder,
            fix="use the base and configuration of the run",
        )


def require_same_tensors(memory: Mapping[str, Tensor], path: Path) -> None:
    """Compare the tensors in memory with those of a file just written, bit by bit.

    Raises:
        DeloError: naming each tensor that is missing, unexpected or different.
    """
    written = load_file(path)
    report = tensor_report({n: t.shape for n, t in memory.items()}, {n: t.shape for n, t in written.items()})
    report += [
        f"  {name}: its values differ"
        for name in sorted(memory.keys() & written.keys())
        if not torch.equal(memory[name].detach().cpu(), written[name])
    ]
    if report:
        raise DeloError(
            "\n".join(["What was written is not the adapter in memory:", *report]),
            given=path,
            fix="check the disk; the same command trains on from the last checkpoint",
        )


def tensor_report(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> list[str]:
    """One line for every tensor that is missing, unexpected or of another shape; empty when all fit."""
    lines = [f"  {name}: missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"  {name}: unexpected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if tuple(expected[name]) != tuple(found[name]):
            lines.append(f"  {name}: shape {tuple(found[name])}, expected {tuple(expected[name])}")
    return lines
