"""One task, one folder: `adapter_config.json` and `adapter_model.safetensors`, as PEFT reads them
(specification M10)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.errors import DeloError
from delo_llava.experts.config import DeloConfig
from delo_llava.experts.model import tuner
from delo_llava.experts.own import require_own_adapter


def save_adapter(
    model: nn.Module, task: str, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write one task's experts, router and map into `folder`.

    Args:
        model: the PEFT model (not an engine around it).
        task: the adapter's name; the files do not hold it, so it can be loaded under another.
        folder: created if need be.
        state_dict: of the model, when the caller gathered shards itself (ZeRO-3).
    """
    delo = tuner(model)
    if task not in delo.peft_config:
        raise DeloError("No experts for this task", given=task, allowed=list(delo.peft_config))
    state = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=task, save_embedding_layers=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = delo.peft_config[task]
    trained, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = trained


def load_adapters(base: nn.Module, folders: Mapping[str, Path]) -> PeftModel:
    """The base with the experts of several tasks, frozen, for inference; rows may be of different tasks.

    Args:
        base: the frozen base model.
        folders: task -> folder, in training order; at least one.
    """
    if not folders:
        raise DeloError("No adapters to load", given="an empty list of folders", fix="train a stage first")
    for task, folder in folders.items():
        if not (folder / "adapter_model.safetensors").is_file():
            raise DeloError(
                f"The experts of task {task} are missing", given=folder, fix="train the stage again"
            )
        require_own_adapter(folder, DeloConfig)
    (first, first_folder), *others = folders.items()
    with torch.random.fork_rng(
        devices=[]
    ):  # PEFT draws initial weights before it loads; the caller's stream stays as it is
        model = PeftModel.from_pretrained(base, str(first_folder), adapter_name=first, is_trainable=False)
        for task, folder in others:
            model.load_adapter(str(folder), adapter_name=task, is_trainable=False)
    for task, folder in folders.items():
        _check_complete(model, task, folder)
    return model


def _check_complete(model: nn.Module, task: str, folder: Path) -> None:
    """PEFT only warns of missing tensors; a half-loaded expert must not answer."""
    expected = get_peft_model_state_dict(model, adapter_name=task, save_embedding_layers=False).keys()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        differing = sorted(expected ^ set(file.keys()))
    if differing:
        raise DeloError(
            f"The experts of task {task} do not fit the base model",
            given=f"{len(differing)} tensors, such as {differing[0]}",
            fix="use the base and configuration of the run",
        )
