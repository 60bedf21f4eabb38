"""Whose frozen features decide, for methods that decide per sample: the base's own, or those of an encoder
beside it."""

from dataclasses import replace
from typing import Any

from torch import nn

from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.features.encoder import Encoder
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.base import Method


class EncodedMethod(Method):
    """A method whose options may have `encoder`, a folder with a CLIP; else the base's features decide."""

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        folder = getattr(options, "encoder", None)
        self.encoder = None if folder is None else Encoder(folder)
        if folder is not None:
            self.capabilities = replace(self.capabilities, encoders=(str(folder),))

    def width(self, base: nn.Module) -> int:
        """Length of the queries that decide."""
        return self.backbone.hidden_size(base) if self.encoder is None else self.encoder.width

    def inputs(self, batch: Batch, **options: Any) -> RouteInputs:
        """What routing must know of a batch; `options` as for `RouteInputs.from_batch`."""
        queries = None if self.encoder is None else self.encoder.queries(batch)
        return RouteInputs.from_batch(batch, queries=queries, **options)
