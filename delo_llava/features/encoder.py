"""Queries from an encoder beside the base: a CLIP in a local folder, for methods whose papers ask for one.

Everything is encoded alone and kept, so a sample's query hangs on nothing else in its batch, and an epoch
after the first one encodes nothing. The encoder is frozen, fp32, and no part of the model: no engine shards
it and no adapter's file holds it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from delo_llava.data.collate import Batch
from delo_llava.data.examples import Item
from delo_llava.data.images import decode
from delo_llava.errors import DeloError
from delo_llava.features.queries import Queries
from delo_llava.strict import read_json

#: Queries kept of each kind: at CLIP's 768 numbers, 200 MB.
KEPT = 65_536
KINDS = ("clip",)


class Encoder:
    """A CLIP in Hugging Face's format.

    Args:
        folder: with config.json, safetensors, tokenizer and image processor.

    Attributes:
        width: of its joint space of images and texts, the length of a query.

    Raises:
        DeloError: no such folder, or another kind of model.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json", "The encoder's configuration", "give a folder with a CLIP")
        if config.get("model_type") not in KINDS:
            raise DeloError(
                "This is no encoder of images and texts", given=f"{folder}: {config.get('model_type')}",
                allowed=KINDS, fix="give a folder with a CLIP, or leave the option out",
            )  # fmt: skip
        self.folder, self.width = folder, int(config.get("projection_dim", 512))
        self._parts: tuple[Any, Any, Any] | None = None
        self._device = torch.device("cpu")
        self._image: Callable[[Path], Tensor] = lru_cache(KEPT)(self._encode_image)
        self._text: Callable[[str], Tensor] = lru_cache(KEPT)(self._encode_text)

    def queries(self, batch: Batch) -> Queries:
        """B×width each, of length one; zero where the sample has none of it. Texts are cut to what the
        encoder takes.
        """
        self._device = batch.segments.device
        shown = zip(batch.items, batch.presence.tolist(), strict=True)
        rows = [self._row(item, *seen) for item, seen in shown]
        views = (torch.stack([row[view] for row in rows]) for view in range(3))
        return Queries(*(view.to(self._device) for view in views))

    def _row(self, item: Item, image: bool, text: bool) -> Sequence[Tensor]:
        record, zero = item[0], torch.zeros(self.width)
        return (
            self._image(record.image) if image and record.image is not None else zero,
            self._text(record.context) if text and record.context else zero,
            self._text(record.instruction) if record.instruction.strip() else zero,
        )

    def _loaded(self) -> tuple[Any, Any, Any]:
        """Model, image processor and tokenizer, read when the first sample is encoded."""
        if self._parts is None:
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

            try:
                model = AutoModel.from_pretrained(
                    self.folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
                )
                images = AutoImageProcessor.from_pretrained(self.folder, trust_remote_code=False)
                words = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            except (OSError, SafetensorError, ValueError) as error:
                raise DeloError(
                    f"The encoder cannot be loaded: {error}", given=self.folder,
                    fix="give a folder with config, safetensors, tokenizer and image processor",
                ) from error  # fmt: skip
            self._parts = model.requires_grad_(False).eval(), images, words
        model = self._parts[0].to(self._device)
        return model, *self._parts[1:]

    def _encode_image(self, path: Path) -> Tensor:
        model, images, _ = self._loaded()
        pixels = images([decode(path)], return_tensors="pt")["pixel_values"].to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return _unit(model.get_image_features(pixel_values=pixels))

    def _encode_text(self, text: str) -> Tensor:
        model, _, words = self._loaded()
        longest = int(model.config.text_config.max_position_embeddings)
        tokens = words([text], truncation=True, max_length=longest, return_tensors="pt").to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return _unit(
                model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
            )


def _unit(features: Any) -> Tensor:
    """The one row of what a model gives, of length one, on the CPU."""
    row: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(row[0].double(), dim=-1).float().cpu()
