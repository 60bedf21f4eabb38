"""What a GPU holds, part by part, in bytes: exact counts where they are exact, a simulated step for the rest.

Notation: P trainable parameters of a stage, w ranks, fp32 = 4 bytes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch

from delo_llava.backbones.base import adapted_linears
from delo_llava.cluster.models import PlannedModel
from delo_llava.cluster.simulate import (
    LiveBytes,
    Step,
    Update,
    forward_only,
    meta_model,
    peak_of_step,
)
from delo_llava.config import RunConfig
from delo_llava.data.recipe import read_recipe
from delo_llava.methods.base import Footprint, Method
from delo_llava.registry import load_plugin

#: bitsandbytes' NF4 with double quantisation: half a byte a weight, one byte for 64 of them, 4 for 64·256.
NF4_BYTES = 0.5
NF4_STATE_BYTES = 1 / 64 + 4 / (64 * 256)
#: CUDA context, cuBLAS and NCCL work spaces: what a process takes before its first tensor.
CONTEXT_BYTES = 1.2 * 2**30
#: Share of the dynamic part that a caching allocator loses to fragmentation.
FRAGMENTATION = 0.08
#: DeepSpeed's communication buckets (ds_configs/*.json), in elements.
BUCKET = 50_000_000


@dataclass(frozen=True)
class Setup:
    """How a stage is run: everything that changes memory and speed."""

    quant: str
    zero: str
    checkpointing: bool
    micro_batch: int
    world: int

    def label(self) -> str:
        """In the words of the command line."""
        words = [f"--quant {self.quant}", f"--zero {self.zero}", f"--train.micro_batch {self.micro_batch}"]
        return " ".join([*words, *(["--train.gradient_checkpointing"] if self.checkpointing else [])])


@dataclass(frozen=True)
class Parts:
    """Bytes on one GPU.

    Attributes:
        loading: the peak while the base is loaded: every rank first holds all of it, under ZeRO-3 too.
        host: what offloading puts into main memory instead.
    """

    base: float
    quant_state: float
    adapters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    tower: float
    overhead: float
    loading: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All that is held at once while the job runs."""
        return float(sum(value for name, value in vars(self).items() if name not in ("loading", "host")))

    @property
    def needed(self) -> float:
        """What the GPU must have: for running, or for loading if that takes more."""
        return max(self.total, self.loading)


class MemoryModel:
    """Memory of one run's stages on a model.

    Args:
        tokens: of the longest sequence, image tokens included.
        answers: of them those that are trained; None: as many as an answer may have.
        cuda: on a GPU (bf16, context and fragmentation) or as measured on the CPU (fp32, neither).
    """

    def __init__(
        self,
        model: PlannedModel,
        config: RunConfig,
        tokens: int,
        cuda: bool = True,
        answers: int | None = None,
    ) -> None:
        self.model, self.config, self.tokens, self.cuda = model, config, tokens, cuda
        self.answers = min(tokens, new_tokens(config) if answers is None else answers)
        self.dtype = torch.bfloat16 if cuda else torch.float32
        base = meta_model(model.backbone, model.config, self.dtype)
        kind = cast(type[Method], load_plugin("method", config.method))
        options = kind.Config(**config.methods.get(config.method, {}))
        self.method = kind(options, config, model.backbone)
        self.footprint: Footprint = self.method.footprint(base)
        self.parameters = sum(p.numel() for p in _unique(base))
        self.linear_weights = sum(
            i * o for n, (i, o) in adapted_linears(base, model.backbone).items() if self._is_language(n)
        )
        self._step, self._prompt = cache(self._simulate), cache(self._prefill)

    def training(self, setup: Setup) -> Parts:
        """One rank while a stage trains."""
        p, w, stage = self.footprint.parameters, setup.world, setup.zero[0]
        base, state = self.base_bytes(setup.quant)
        shared = w if stage == "3" else 1
        offload = setup.zero.endswith("offload")
        # ZeRO keeps its own fp32 copy of what it updates, besides the two moments.
        moments = 8 * p if stage == "n" else 12 * p / w
        peak = self.step_bytes(setup)
        return Parts(
            base=base / shared,
            quant_state=state,
            adapters=4 * (p / shared + self.footprint.untrained),
            gradients=4 * p / (w if stage in "23" else 1),
            optimizer=0.0 if offload else moments,
            buffers=0.0 if stage == "n" else 4 * min(p, BUCKET),
            activations=peak * (1 + FRAGMENTATION * self.cuda),
            tower=self._tower(setup.micro_batch),
            overhead=CONTEXT_BYTES * self.cuda,
            loading=base + state + CONTEXT_BYTES * self.cuda,
            host=moments if offload else 0.0,
        )

    def step_bytes(self, setup: Setup) -> float:
        """What a forward and backward pass needs at most beyond weights, gradients and optimiser."""
        linears = _affine(partial(self._step, setup.quant, setup.checkpointing), setup.micro_batch)
        return linears + self.footprint.held

    def evaluation(self, quant: str, batch: int, stored: int, new_tokens: int) -> Parts:
        """One rank while it answers `batch` questions with `stored` finished stages."""
        base, state = self.base_bytes(quant)
        text = self.model.config.get_text_config()
        heads = text.num_key_value_heads or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        length = self.tokens + new_tokens
        cache_bytes = 2 * text.num_hidden_layers * heads * width * length * batch * self.dtype.itemsize
        numbers = self.footprint.parameters + self.footprint.untrained
        adapters = 4 * numbers * (stored if self.footprint.every_task else 1)
        peak = _affine(self._prompt, batch) + cache_bytes
        return Parts(
            base=base, quant_state=state, adapters=adapters, gradients=0.0, optimizer=0.0, buffers=0.0,
            activations=peak * (1 + FRAGMENTATION * self.cuda), tower=self._tower(batch),
            overhead=CONTEXT_BYTES * self.cuda, loading=base + state + CONTEXT_BYTES * self.cuda,
        )  # fmt: skip

    def base_bytes(self, quant: str) -> tuple[float, float]:
        """The frozen base and the quantisation state that belongs to it."""
        if quant != "nf4":
            return self.parameters * self.dtype.itemsize, 0.0
        rest = (self.parameters - self.linear_weights) * self.dtype.itemsize
        return rest + NF4_BYTES * self.linear_weights, NF4_STATE_BYTES * self.linear_weights

    def _is_language(self, name: str) -> bool:
        return re.fullmatch(self.model.backbone.language_pattern, name) is not None

    def _simulate(self, quant: str, checkpointing: bool, rows: int) -> int:
        """Bytes of a step of `rows` samples."""
        image = self.model.image.tokens
        step = Step(rows, self.tokens, image, self.answers, checkpointing, quant == "nf4")
        backbone = self.model.backbone
        return peak_of_step(
            meta_model(self.model.backbone, self.model.config, self.dtype),
            (backbone.language_pattern, backbone.projector_pattern),
            Update(self.footprint.kind, self.footprint.rank),
            step,
        )

    def _prefill(self, rows: int) -> int:
        """Bytes of reading the prompts, without gradient; the cache is counted apart."""
        image = self.model.image.tokens
        step = Step(rows, self.tokens, image, answers=1, checkpointing=False, quantised=False)
        model = meta_model(
            self.model.backbone, self.model.config, self.dtype
        )  # outside: its weights are counted apart
        with LiveBytes() as live:
            forward_only(model, step)
        return int(live.peak)

    def _tower(self, images: int) -> float:
        """The vision tower runs without gradient: a few activations of one layer."""
        image = self.model.image
        return float(images * image.patches * image.floats * self.dtype.itemsize)


def new_tokens(config: RunConfig) -> int:
    """The most tokens that an answer of a run's tasks may have."""
    return max(entry.max_new_tokens for entry in read_recipe(config.task_seq).tasks)


def _affine(peak: Callable[[int], int], rows: int) -> float:
    """`peak(rows)` from its values at one and two rows: every tensor of a step grows with the rows or not at
    all."""
    one, two = peak(1), peak(2)
    return one + (two - one) * (rows - 1)


def _unique(model: Any) -> list[Any]:
    """Parameters, tied ones once."""
    return list({id(p): p for p in model.parameters()}.values())
