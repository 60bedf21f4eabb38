"""The real peak of a training step, to check the plan against: the profiler's on the CPU, else CUDA's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from delo_llava.backbones.base import find_backbone, resolve_device
from delo_llava.config import RunConfig
from delo_llava.data.collate import IGNORE, Batch, Collator
from delo_llava.data.segments import SEGMENT_IMAGE
from delo_llava.methods.base import Method, Stage
from delo_llava.registry import load_plugin
from delo_llava.runs.stage import checkpoint_activations
from delo_llava.tasks import Record


@dataclass(frozen=True)
class Measured:
    """Bytes of a step beyond weights and gradients, bytes of the weights, and the batch they belong to:
    `answers` are a row's trained tokens.
    """

    step: int
    weights: int
    rows: int
    tokens: int
    image_tokens: int
    answers: int


def measure_step(config: RunConfig, picture: Path, words: int) -> Measured:
    """Run one forward and backward of `config`'s first stage on made-up records and take its peak.

    Args:
        picture: an image file that is written.
        words: length of the records' context.
    """
    backbone, path = find_backbone(config.model)
    device = resolve_device(config.device)
    kind = cast(type[Method], load_plugin("method", config.method))
    method = kind(kind.Config(**config.methods.get(config.method, {})), config, backbone)
    base = backbone.load(path, quant=config.quant, dtype=config.dtype, attn=config.attn, device=str(device))
    base.config.get_text_config().use_cache = False
    model = method.begin(base, Stage(0, "planned"))
    if config.train.gradient_checkpointing:
        checkpoint_activations(base, model, method)
    model.train()
    collator = Collator(backbone, backbone.load_processor(path, config.data.limits), config.data.max_length)
    batch = collator(_items(config.train.micro_batch, picture, words)).to(device)
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    weights = sum(t.numel() * t.element_size() for t in held)
    _step(method, model, batch)  # gradients and caches exist from here on
    peak = _cuda_peak(method, model, batch) if device.type == "cuda" else _cpu_peak(method, model, batch)
    rows, tokens = batch.inputs["input_ids"].shape
    assert batch.labels is not None
    image, answers = (batch.segments[0] == SEGMENT_IMAGE).sum(), (batch.labels[0] != IGNORE).sum()
    return Measured(peak, weights, rows, tokens, int(image), int(answers))


def _items(rows: int, picture: Path, words: int) -> list[tuple[Record, tuple[bool, bool]]]:
    Image.new("RGB", (336, 336), "red").save(picture)
    text = " ".join(["word"] * words)
    records = [Record(str(i), "planned", "train", picture, text, "what is it?", "a") for i in range(rows)]
    return [(record, (True, True)) for record in records]


def _step(method: Method, model: Any, batch: Batch) -> None:
    sums = method.loss_sums(model, batch)
    torch.stack(list(sums.values())).sum().backward()


def _cpu_peak(method: Method, model: Any, batch: Batch) -> int:
    """The highest sum of all allocations and releases that the profiler saw."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        _step(method, model, batch)
    now = peak = 0
    for event in cast(Any, profile).profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _cuda_peak(method: Method, model: Any, batch: Batch) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(method, model, batch)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
