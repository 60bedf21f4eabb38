"""A stage of a run as a plain Hugging Face folder: its adapters folded into the weights of its base.

Nothing of this project is needed to load the result, and nothing is computed beside its weights.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from delo_llava.adapters.merging import fold, without_adapters
from delo_llava.adapters.unmergeable import cannot_merge
from delo_llava.backbones._quant import dequantise_
from delo_llava.backbones.base import DTYPES, find_backbone
from delo_llava.config import config_layers, core_config, with_methods
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file, write_json_atomic
from delo_llava.methods.base import Method, Past
from delo_llava.registry import load_plugin
from delo_llava.runs.exportable import exportable_stages
from delo_llava.runs.identity import base_differences, base_facts
from delo_llava.runs.manifest import MANIFEST
from delo_llava.runs.publish import published
from delo_llava.runs.record import versions
from delo_llava.runs.store import RunStore

PROVENANCE = "provenance.json"
#: What checkpoints keep of tokenizer, image processor and chat template.
PROCESSOR_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
#: Whose weights the update is added to: those that it was trained on, or the checkpoint's own.
Onto = Literal["trained", "original"]


@dataclass(frozen=True)
class Merged:
    """A plain model.

    Attributes:
        rounding: linear -> ‖what rounding to the weights' type changed‖ / ‖update‖.
    """

    model: Any
    rounding: dict[str, float]


def merge(
    method: Method, path: str, past: Mapping[str, Past], dtype: torch.dtype, onto: Onto, device: str
) -> Merged:
    """The base at `path` with what the stages in `past` added to its weights, each weight rounded once.

    Args:
        onto: under 4 bit, `trained` keeps the weights that 4 bit stands for, so the result is the function
            that was trained and evaluated; `original` adds to the checkpoint's, which nobody evaluated.

    Raises:
        DeloError: the method cannot be merged (before a model is loaded), or a merged weight is not finite.
    """
    _require_mergeable(method)
    run, backbone = method.run, method.backbone
    if run.quant == "nf4" and onto == "trained":
        base = backbone.load(path, quant="nf4", dtype=run.dtype, attn=run.attn, device=device)
        dequantise_(base)
    else:
        base = backbone.load(path, quant="none", dtype=stored_dtype(path), attn=run.attn, device=device)
    model: Any = method.load(base, past)
    rounding = {}
    for name, update in method.updates(model):
        linear = model.get_base_model().get_submodule(name).get_base_layer()
        rounding[name] = fold(linear, update, dtype)
    return Merged(without_adapters(model).to(dtype), rounding)


def export_stage(
    run: Path, stage: str, target: Path, *, dtype: str = "auto", onto: Onto = "trained", device: str = "auto"
) -> dict[str, Any]:
    """Write the model as it stands after a stage into the folder `target`, whole or not at all.

    Args:
        stage: its name, its index from 0, or `last`.
        dtype: of all weights; `auto` is the checkpoint's own.

    Returns:
        What `provenance.json` says: where the weights come from, and how much rounding took.

    Raises:
        DeloError: no such run, stage or base, a base or a published adapter that changed, a method that
            cannot be merged, or a target that exists or cannot be written.
    """
    names, store = exportable_stages(run, stage, target), RunStore(run)
    config = with_methods(core_config(config_layers(store.config, [])))
    backbone, path = find_backbone(config.model)
    kind = cast(type[Method], load_plugin("method", config.method))
    method = kind(kind.Config(**config.methods[config.method]), config, backbone)
    _require_mergeable(method)
    store.verify_published(names)
    if lines := base_differences(store.read_run().get("base", {}), base_facts(store, path, keep=False)):
        raise DeloError(
            "The base is not the one that the adapters were trained over.",
            given="; ".join(lines),
            fix="put the run's own base back",
        )
    number = stored_dtype(path) if dtype == "auto" else DTYPES[dtype]
    merged = merge(method, path, {n: Past(store.adapter(n)) for n in names}, number, onto, device)
    facts = {
        "schema": "delo-llava/export/1",
        "stage": names[-1],
        "method": {"name": config.method, **config.methods[config.method]},
        "base": {"name": config.model, "sha256": store.read_run().get("base", {}).get("sha256")},
        "adapters": {name: sha256_file(store.adapter(name) / MANIFEST) for name in names},
        "onto": onto if config.quant == "nf4" else "original",
        "dtype": str(number).removeprefix("torch."),
        "rounding": {"largest": max(merged.rounding.values()), "linears": len(merged.rounding)},
        "versions": versions(),
    }
    with published(target, "The exported model", lambda folder: None, "make room or rights there") as draft:
        merged.model.save_pretrained(draft)
        copy_processor(path, draft)
        write_json_atomic(draft / PROVENANCE, facts)
    return facts


def _require_mergeable(method: Method) -> None:
    if not method.capabilities.mergeable:
        raise cannot_merge(method.run.method, method.why_unmerged)


def copy_processor(path: str, folder: Path) -> None:
    """Tokenizer, image processor and chat template as the checkpoint (a folder or hub id) has them."""
    for name in PROCESSOR_FILES:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


def stored_dtype(path: str) -> torch.dtype:
    """The type in which a checkpoint keeps its weights, by its configuration."""
    found, _ = PreTrainedConfig.get_config_dict(path)
    return DTYPES.get(str(found.get("dtype") or found.get("torch_dtype")), torch.float32)
