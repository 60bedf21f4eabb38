"""A training forward without an image runs one that belongs to no row, so that every rank runs the same
modules.

Under ZeRO-3 ranks gather parameters module by module, together: one whose micro-batch has no image would
leave the others waiting at the vision tower, and its projector, left without a gradient, would be updated by
that of the step before. The dummy's features are added to the word embeddings, times zero: there, as backward
passes must gather in one order too. What it costs is one small image through the tower for each
micro-batch without images.
"""

from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.adapters.carrier import find_carrier
from delo_llava.backbones.base import unwrapped


class DummyImage:
    """Hooks on one model; they act in training only.

    Args:
        model: bare or wrapped by PEFT; it must not be sharded yet.
        inputs: the picture's, from the backbone's `tiny_image`.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        inner: Any = unwrapped(model)
        self._inner = inner
        self._carrier, self._wanted = find_carrier(model), False
        self._inputs = inputs
        self._hooks = [
            inner.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True),
            inner.register_forward_hook(self._forget, always_call=True),
            inner.get_decoder().register_forward_pre_hook(self._join, with_kwargs=True, prepend=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._wanted = module.training and torch.is_grad_enabled() and kwargs.get("pixel_values") is None
        if self._carrier is not None:
            self._carrier.dummy = self._wanted

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        self._wanted = False
        if self._carrier is not None:
            self._carrier.dummy = False

    def _join(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if not self._wanted:
            return None
        self._wanted = False
        words: Tensor = kwargs["inputs_embeds"]
        given = {name: value.to(words.device) for name, value in self._inputs.items()}
        # Random numbers (dropout) are drawn as if there were no dummy.
        with torch.random.fork_rng(devices=[words.device] if words.is_cuda else []):
            features = self._inner.get_image_features(**given).pooler_output
        seen = features if torch.is_tensor(features) else torch.cat(list(features))
        return args, kwargs | {"inputs_embeds": words + 0.0 * seen.sum().to(words.dtype)}
