"""The peak memory of one training step, found by running it on the meta device: shapes only, nothing stored.

Forward and backward of the language model, with the method's update at every adapted linear, go through
autograd as in training; a dispatch mode adds up the bytes of every storage that is alive. So what is saved
for the backward pass, what checkpointing drops and what the logits cost follows from PyTorch itself.
"""

import re
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delo_llava.backbones.base import Backbone, attention_choices, first_that_builds

#: What a method adds to a linear: factors gathered per sample, or one pair of matrices for all.
UpdateKind = Literal["gathered", "lora"]
ATTENTION = "delo_planned"


@dataclass(frozen=True)
class Update:
    """The trained update of a linear: `rank` is the active one (both modalities together)."""

    kind: UpdateKind
    rank: int


@dataclass(frozen=True)
class Step:
    """One micro-batch as the language model sees it.

    Attributes:
        rows: samples of the micro-batch.
        tokens: of the longest sequence, image tokens included.
        image_tokens: of one sample.
        answers: tokens of one sample that are trained: the output head sees no others.
        checkpointing: activations of every layer are recomputed.
        quantised: linears of the language layers are dequantised for every product.
    """

    rows: int
    tokens: int
    image_tokens: int
    answers: int
    checkpointing: bool
    quantised: bool


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made within the block and still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _real(leaf)}
        for leaf in tree_leaves(result):
            if _real(leaf):
                self._add(leaf.untyped_storage(), before)
        return result

    def _add(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in before:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _real(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


class PlannedLinear(nn.Module):
    """A frozen linear with a trained update, by the operations that training uses."""

    def __init__(self, linear: nn.Linear, update: Update, quantised: bool) -> None:
        super().__init__()
        wide, out = linear.in_features, linear.out_features
        self.frozen, self.kind, self.quantised = linear.requires_grad_(False), update.kind, quantised
        self.a = nn.Parameter(torch.empty(update.rank, wide, device="meta"))
        self.b = nn.Parameter(torch.empty(update.rank, out, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as `nn.Linear`."""
        weight, bias = self.frozen.weight, self.frozen.bias
        y = _Dequantised.apply(x, weight, bias) if self.quantised else F.linear(x, weight, bias)
        return self._gathered(x, y) if self.kind == "gathered" else self._lora(x, y)

    def _gathered(self, x: Tensor, y: Tensor) -> Tensor:
        """As `experts.layer.DeloLayer`: factors of every row looked up in fp32 and cast."""
        rows = x if x.dim() == 3 else x.unsqueeze(0)
        index = torch.zeros(len(rows), len(self.a), dtype=torch.int64, device="meta")
        a = F.embedding(index, self.a).to(x.dtype)
        b = F.embedding(index, self.b).to(x.dtype)
        u = torch.bmm(rows, a.transpose(1, 2))
        u = u * torch.empty_like(u) * torch.empty_like(u)  # gates, and which token each factor acts on
        return torch.baddbmm(y.view(*rows.shape[:2], -1), u, b).view_as(y)

    def _lora(self, x: Tensor, y: Tensor) -> Tensor:
        """As PEFT: adapters and their input in fp32."""
        delta = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b.t()) * 2.0
        return y + delta.to(y.dtype)


class _Dequantised(torch.autograd.Function):
    """A 4-bit product: the weight exists in full precision only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        return gradients[0] @ torch.empty_like(ctx.weight, dtype=gradients[0].dtype), None, None


class _Attention(torch.autograd.Function):
    """Fused attention: saves queries, keys, values, output and one number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface over `_Attention`; grouped keys are repeated as sdpa has them."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    output: Tensor = _Attention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def meta_model(backbone: Backbone, config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration with shapes but without weights, frozen, as its backbone prepares it."""
    from transformers import AttentionInterface, AutoModelForImageTextToText

    AttentionInterface.register(ATTENTION, _attention)
    build = AutoModelForImageTextToText.from_config
    choices = attention_choices("auto", torch.device("cpu"), dtype, backbone.attention)
    with torch.device("meta"):
        model = first_that_builds(choices, lambda a: build(config, dtype=dtype, attn_implementation=a))
    backbone.prepare(model)
    model.get_decoder().config._attn_implementation = ATTENTION
    return model.requires_grad_(False)


def peak_of_step(model: Any, patterns: tuple[str, str], update: Update, step: Step) -> int:
    """Bytes that one forward and backward need at most beyond weights, gradients and optimiser.

    Args:
        model: from `meta_model`; its adapted linears are replaced for good.
        patterns: full-match regexes of the language layers' and of the projector's linears.
    """
    language, head = model.get_decoder(), model.get_output_embeddings()
    _with_updates(model, patterns, update, step.quantised)
    language.train()
    if step.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    language.config.use_cache = False
    width, number = language.config.hidden_size, next(model.parameters()).dtype
    grads = [p for p in model.parameters() if p.requires_grad]
    for parameter in grads:
        parameter.grad = torch.empty_like(parameter)  # gradients are counted apart, so they exist already
    with LiveBytes() as live:
        words = torch.empty(step.rows, step.tokens, width, dtype=number, device="meta")
        words.requires_grad_(step.image_tokens > 0)  # the projector's experts want a gradient
        _loss(language, head, words, step).backward()
    return int(live.peak)


def forward_only(model: Any, step: Step) -> None:
    """Read a batch of prompts on the meta device; logits of the last position only, as in generation."""
    language = model.get_decoder()
    number = next(model.parameters()).dtype
    with torch.no_grad():
        words = torch.empty(step.rows, step.tokens, language.config.hidden_size, dtype=number, device="meta")
        hidden = language(
            inputs_embeds=words, position_ids=_positions(step), attention_mask=_mask(step), use_cache=False
        ).last_hidden_state
        model.get_output_embeddings()(hidden[:, -1:]).float()


def _positions(step: Step) -> Tensor:
    return torch.zeros(1, step.tokens, dtype=torch.int64, device="meta")


def _mask(step: Step) -> Tensor:
    return torch.empty(step.rows, 1, step.tokens, step.tokens, dtype=torch.bool, device="meta")


def _loss(language: Any, head: Any, words: Tensor, step: Step) -> Tensor:
    """The summed loss; a function of its own, since the logits must be gone before the backward pass."""
    hidden = language(
        inputs_embeds=words, position_ids=_positions(step), attention_mask=_mask(step)
    ).last_hidden_state
    logits = head(hidden[:, : step.answers].flatten(0, 1))
    labels = torch.zeros(len(logits), dtype=torch.int64, device="meta")
    return F.cross_entropy(logits.float(), labels, reduction="none").sum()


def _with_updates(model: Any, patterns: tuple[str, str], update: Update, quantised: bool) -> None:
    for name, module in list(model.named_modules()):
        inside = isinstance(module, nn.Linear) and any(re.fullmatch(p, name) for p in patterns)
        if inside:
            parent, _, child = name.rpartition(".")
            is_language = re.fullmatch(patterns[0], name) is not None
            planned = PlannedLinear(module, update, quantised and is_language)
            setattr(model.get_submodule(parent), child, planned)
