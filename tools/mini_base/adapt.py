"""Plain LoRA adapters on the frozen NF4 base, as light as possible: mini6 and the base are tuned with them.

Kept apart from the trainer on purpose: no recipe, engine or method, so the gate judges a base by itself. What
the model reads is the product's: its backbone, its reader and its collator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from delo_llava.backbones.base import Backbone, find_backbone
from delo_llava.data.collate import IGNORE, Collator
from delo_llava.data.readers import read_records
from delo_llava.mini.entities import SPLITS, Split
from delo_llava.tasks import Record, TaskSpec

Presence = tuple[bool, bool]
"""(image, context)."""
COMPLETE, NO_IMAGE, NO_CONTEXT = (True, True), (False, True), (True, False)
PROMPT_LIMIT = 256


@dataclass
class Base:
    """The frozen quantised model and what turns records into its inputs."""

    model: Any
    backbone: Backbone
    collator: Collator

    @classmethod
    def load(cls, name: str) -> "Base":
        """Load a model (folder or shipped name) with its language layers in NF4."""
        backbone, path = find_backbone(name)
        model = backbone.load(path, quant="nf4", device="cpu")
        return cls(model, backbone, Collator(backbone, backbone.load_processor(path), PROMPT_LIMIT))


@dataclass(frozen=True)
class Training:
    """How an adapter is trained; the defaults are those of mini6's recipe (two epochs)."""

    steps: int = 100
    batch: int = 32
    rate: float = 2e-3
    rank: int = 8
    seed: int = 0

    def share_of_rate(self, step: int) -> float:
        """A linear rise over the first twentieth of the steps, then half a cosine to zero."""
        rise = max(1, self.steps // 20)
        done = min(1.0, max(0, step - rise) / max(1, self.steps - rise))
        return (step + 1) / rise if step < rise else 0.5 * (1.0 + math.cos(math.pi * done))


def read(root: Path, task: str, split: Split) -> Sequence[Record]:
    """One split of a task of a built mini6."""
    files = {s: root / task / f"{s}.json" for s in SPLITS}
    return list(read_records(TaskSpec(task, task, files, root), split, 1.0, 0))


def answer_logits(
    base: Base, model: nn.Module, records: Sequence[Record], presence: Sequence[Presence]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] that predict each answer token, the tokens [N], and the row each belongs to [N]."""
    batch = base.collator.collate(list(zip(records, presence, strict=True)))
    assert batch.labels is not None
    wanted = batch.labels[:, 1:] != IGNORE
    logits = model(**batch.inputs).logits[:, :-1][wanted]
    return logits, batch.labels[:, 1:][wanted], wanted.nonzero()[:, 0]


def new_adapter(base: Base, training: Training) -> PeftModel:
    """A fresh LoRA (alpha = 2 r) on all language and projector linears."""
    torch.manual_seed(training.seed)
    targets = f"(?:{base.backbone.language_pattern})|(?:{base.backbone.projector_pattern})"
    options = LoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules=targets)
    return get_peft_model(base.model, options)


def fit(
    base: Base, adapter: PeftModel, records: Sequence[Record], training: Training, missing: float = 0.0
) -> float:
    """Train the adapter in place and return the mean loss of the last tenth of the steps.

    Args:
        missing: share of records that lose one modality, half of them the image (drawn once).
    """
    rng = np.random.default_rng(training.seed)
    presence = missing_half_half(rng, len(records), missing)
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.share_of_rate)
    adapter.train()
    losses, order = [], np.array([], dtype=int)
    for _ in range(training.steps):
        while len(order) < training.batch:
            order = np.concatenate([order, rng.permutation(len(records))])
        chosen, order = order[: training.batch], order[training.batch :]
        logits, tokens, _ = answer_logits(
            base, adapter, [records[i] for i in chosen], [presence[i] for i in chosen]
        )
        loss = nn.functional.cross_entropy(logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, training.steps // 10) :]))


def missing_half_half(rng: np.random.Generator, count: int, ratio: float) -> list[Presence]:
    """An exact share of rows lose one modality: half of these the image, half the context."""
    presence: list[Presence] = [COMPLETE] * count
    lost = rng.permutation(count)[: int(ratio * count)]
    for place, row in enumerate(lost):
        presence[int(row)] = NO_IMAGE if place < len(lost) // 2 else NO_CONTEXT
    return presence


@torch.no_grad()
def exact_match(
    base: Base, records: Sequence[Record], presence: Sequence[Presence], batch: int = 50
) -> float:
    """Share of records whose every answer token, `</s>` included, is the likeliest one given those before it.

    That is the exact match of greedy decoding, which leaves the reference at the first token that is not the
    likeliest. The adapter that is injected in the base at the time is judged.
    """
    base.model.eval()
    right = 0
    for start in range(0, len(records), batch):
        part = slice(start, start + batch)
        logits, tokens, owner = answer_logits(base, base.model, records[part], presence[part])
        wrong = owner[logits.argmax(-1) != tokens]
        right += len(records[part]) - len(wrong.unique())
    return right / len(records)
