"""A stored run with its method and base, and its model after one of its stages."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from delo_eval.harness.folder import AS_STORED, Request, RunFolder, open_folder
from delo_eval.harness.generate import Answerer
from delo_llava.backbones.base import Backbone, find_backbone
from delo_llava.config import with_methods
from delo_llava.data.collate import Collator
from delo_llava.methods.base import Method, Past
from delo_llava.registry import load_plugin


@dataclass
class StoredRun(RunFolder):
    """A run's folder with what it takes to answer."""

    backbone: Backbone
    model_path: str
    method: Method


def open_run(run_dir: Path, request: Request = AS_STORED) -> StoredRun:
    """Read a run's stored configuration and find its method and base; no model is loaded.

    Raises:
        DeloError: no run there, data or model gone, or an impossible request.
    """
    found = open_folder(run_dir, request)
    config = with_methods(found.config)
    backbone, path = find_backbone(config.model)
    kind = cast(type[Method], load_plugin("method", config.method))
    method = kind(kind.Config(**config.methods.get(config.method, {})), config, backbone)
    return StoredRun(
        found.store, config, found.sequence, found.output, found.patterns, backbone, path, method
    )


@contextmanager
def answerer(run: StoredRun, stage: int, device: torch.device) -> Iterator[Answerer]:
    """The run's model after `stage`, loaded for answering and freed at the end."""
    config, adapters = run.config, run.adapters(stage)
    base = run.backbone.load(
        run.model_path, quant=config.quant, dtype=config.dtype, attn=config.attn, device=str(device)
    )
    processor = run.backbone.load_processor(run.model_path)
    collator = Collator(
        run.backbone, processor, config.data.max_length, config.missing.image, generation=True
    )
    ready = Answerer(
        model=run.method.load(base, {name: Past(folder) for name, folder in adapters.items()}).eval(),
        method=run.method,
        collate=collator,
        tokenizer=processor.tokenizer,
        device=device,
        trained=tuple(adapters),
        beams=config.eval.num_beams,
        oracle=config.eval.oracle,
        skip_bad_images=config.data.on_bad_image == "skip",
    )
    del base
    try:
        yield ready
    finally:
        del ready.model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
