"""Prompts as the collator makes them, from a tokenizer alone: no weights, no pictures, only their sizes."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from delo_llava.backbones.base import OWN_LIMITS, SHIPPED, Backbone, find_backbone
from delo_llava.data.collate import Collator, Layout
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import ImageLimits
from delo_llava.data.tokens import Row
from delo_llava.errors import DeloError
from delo_llava.tasks import Record

#: The model whose tokenizer stands in when a recipe's own is not on this disk.
STAND_IN = "mini-llava"


class Prompts:
    """The tokens of records for one model.

    Args:
        model: name of a shipped model, folder or hub id.
        max_length: as `data.max_length`; limits: as those of `data`; rooms: as those of the sequence.
    """

    def __init__(
        self,
        model: str,
        max_length: int,
        limits: ImageLimits = OWN_LIMITS,
        rooms: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.max_length = model, max_length
        self.backbone: Backbone
        self.backbone, path = find_backbone(model)
        self.processor: Any = self.backbone.load_processor(path, limits)
        self._collators = {
            generation: Collator(
                self.backbone, self.processor, max_length, generation=generation, rooms=rooms
            )
            for generation in (False, True)
        }
        self.image_layout = lru_cache(maxsize=4096)(self._image_layout)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.processor.tokenizer

    def rows(
        self,
        records: Sequence[Record],
        sizes: Sequence[tuple[int, int] | None],
        text: Sequence[bool] | None = None,
    ) -> list[Row]:
        """Each record tokenised: with its answer in the training split, else up to where it begins.

        Args:
            sizes: width and height of each record's image, None where none is shown.
            text: whether each context is shown; by default, where there is one.

        Raises:
            DeloError: a record that the collator refuses.
        """
        shown = [bool(record.context) for record in records] if text is None else list(text)
        presence = [(size is not None, has) for size, has in zip(sizes, shown, strict=True)]
        images = [None if size is None else self.image_layout(size) for size in sizes]
        generation = records[0].split != "train"
        return self._collators[generation].layout(list(records), presence, images)

    def text(self, record: Record, has_image: bool, has_context: bool) -> str:
        """What `rows` tokenises, before the placeholder is expanded and anything is cut."""
        context = record.context if has_context else None
        dialogue: Dialogue = self.processor.dialogue
        pieces = dialogue.prompt(
            self.backbone.image_token if has_image else None, context, record.instruction
        )
        answer = dialogue.answer(record.answer.strip()) if record.split == "train" else ""
        return "".join(text for text, _ in pieces) + answer

    def _image_layout(self, size: tuple[int, int]) -> Layout:
        """What an image of this width and height becomes.

        Raises:
            DeloError: the model takes no image of this form.
        """
        try:
            return self.backbone.encode_image(self.processor, Image.new("RGB", size)).layout
        except ValueError as error:
            raise DeloError(f"The model takes no image of {size[0]}x{size[1]}: {error}") from error


def local_model(model: str) -> str | None:
    """The model itself, or the folder of its copy on this disk; None when it would have to be fetched."""
    from pathlib import Path

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if model in SHIPPED or Path(model).expanduser().is_dir():
        return model
    try:
        return snapshot_download(model, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
