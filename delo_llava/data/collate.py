"""From records to one batch: prompts with the kind of every token, encoded images, labels on answers only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from delo_llava.data.dialogue import Dialogue
from delo_llava.data.examples import Item, View, shown
from delo_llava.data.images import (
    EncodedImage,
    ImageCache,
    UnusableImage,
    dummy_image,
    image_error,
    load_image,
)
from delo_llava.data.omitted import Cut
from delo_llava.data.segments import SEGMENT_CONTEXT, SEGMENT_IMAGE, SEGMENT_INSTRUCTION, SEGMENT_OTHER
from delo_llava.data.tokens import Row, control_pattern, fit, token_kinds
from delo_llava.errors import DeloError
from delo_llava.tasks import NEW_TOKENS, Record

#: Label of a position that is not trained.
IGNORE = -100

#: Kind of an answer's own words while they are tokenised.
SAID = -1

#: Makes further views of the rows that a batch will have, by name.
Views = Callable[[Sequence[Item]], Mapping[str, View]]

#: What the placeholder of an image becomes: see `EncodedImage`.
Layout = tuple[tuple[str, int], ...]


class PromptFormat(Protocol):
    """What the collator needs of a backbone; see `backbones.base.Backbone` for each member."""

    image_token: ClassVar[str]

    def encode_image(self, parts: Any, image: Image.Image) -> EncodedImage:
        """One picture as the model takes it."""
        ...

    def sequence_inputs(self, segments: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """Further inputs that follow from the token kinds B×S and from which tokens are the answer's."""
        ...


@dataclass
class Batch:
    """B sequences of S tokens with N images.

    Attributes:
        inputs: exactly the model's keyword arguments; those of images are absent when the batch has none.
        labels: int64 B×S, -100 where nothing is trained; None in generation.
        segments: uint8 B×S, one of the SEGMENT_ kinds.
        presence: bool B×2 (image, text): what the sample really has; a dummy image counts as missing.
        image_rows: int64 N, the batch row of each image given to the tower.
        image_units: int64 N, entries of each along dimension 0 of the projector's output.
        image_kept: bool, which projector outputs, in order, the language model sees; None: all.
        answers: reference answers.
        views: some rows once more, shown in another way, by the view's name.
        cut: row -> which of `context`, `instruction` and `answer` were cut.
        filler: no record of this batch could be used; it keeps the ranks in step and trains nothing.
        items: what the rows were made of, for features from outside the base.
        again: collates other rows as these were.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    segments: Tensor
    presence: Tensor
    image_rows: Tensor
    image_units: Tensor
    image_kept: Tensor | None
    record_ids: list[str]
    tasks: list[str]
    answers: list[str]
    views: Mapping[str, "BatchView"] = field(default_factory=dict)
    cut: Mapping[int, Sequence[str]] = field(default_factory=dict)
    filler: bool = False
    items: Sequence[Item] = ()
    again: Callable[[Sequence[Item]], "Batch"] | None = None

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def cuts(self) -> set[Cut]:
        """What was cut, by names of records."""
        return {
            (self.tasks[row], part, self.record_ids[row]) for row, parts in self.cut.items() for part in parts
        }

    def to(self, device: torch.device | str) -> "Batch":
        """A copy with every tensor on `device`."""
        return replace(
            self,
            inputs={key: value.to(device) for key, value in self.inputs.items()},
            labels=None if self.labels is None else self.labels.to(device),
            segments=self.segments.to(device),
            presence=self.presence.to(device),
            image_rows=self.image_rows.to(device),
            image_units=self.image_units.to(device),
            image_kept=None if self.image_kept is None else self.image_kept.to(device),
            views={
                name: BatchView(view.rows.to(device), view.batch.to(device))
                for name, view in self.views.items()
            },
        )


@dataclass
class BatchView:
    """A view of some rows of a batch.

    Attributes:
        rows: int64, rows of the batch that the view shows, in its order.
        batch: the view; a filler where it shows no row.
    """

    rows: Tensor
    batch: Batch


class Collator:
    """Builds batches for one backbone; pads right for training, left (and without the answer) for generation.

    Args:
        backbone: the family's image format.
        processor: from `backbone.load_processor`.
        max_length: most tokens of a prompt with its answer, image tokens included.
        rooms: task -> most tokens of an answer (`TaskSequence.rooms`). A prompt leaves as many free, in
            training as in generation, so that no answer changes what is seen before it. Where it is too long
            it loses the end of its context, then the middle of its instruction, whose end is most often the
            question; never its image. An answer that is longer than its room and does not fit loses its end.
            All of it is told in `Batch.cut`.
        image_mode: what a missing image becomes: `absent` (no tokens) or `dummy` (constant white).
        generation: leave the answers out.
        cache_bytes: bound of the memory of encoded images.
        skip_bad_images: leave records out whose image cannot be used, and note them in `bad_images`.
    """

    def __init__(
        self,
        backbone: PromptFormat,
        processor: Any,
        max_length: int,
        image_mode: Literal["absent", "dummy"] = "absent",
        *,
        generation: bool = False,
        cache_bytes: int = 256 * 2**20,
        skip_bad_images: bool = False,
        rooms: Mapping[str, int] | None = None,
    ) -> None:
        if image_mode not in ("absent", "dummy"):
            raise DeloError(
                "Unknown treatment of missing images.", given=image_mode, allowed=("absent", "dummy")
            )
        self.backbone, self.processor, self.tokenizer = backbone, processor, processor.tokenizer
        self.dialogue: Dialogue = processor.dialogue
        self.max_length, self.image_mode, self.generation = max_length, image_mode, generation
        self.skip_bad_images, self.rooms = skip_bad_images, rooms or {}
        #: task/record id -> why its image cannot be used.
        self.bad_images: dict[str, str] = {}
        self._cache = ImageCache(cache_bytes)
        self._image_id = int(self.tokenizer.convert_tokens_to_ids(backbone.image_token))
        pad = self.tokenizer.pad_token_id
        self._pad_id = int(self.tokenizer.eos_token_id if pad is None else pad)
        self._control = control_pattern(self.tokenizer, backbone.image_token)
        #: Token ids of a piece of a picture's layout.
        self._ids = cache(lambda text: list(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def collate(self, items: Sequence[Item], views: Views | None = None) -> Batch:
        """The batch of `items`, in their order, with further views of its rows.

        Raises:
            DeloError: nothing to train on, an image that cannot be used, or a record that does not fit.
        """
        items, lost = self._usable(items)
        batch = self._batch(items) if items else self._filler(lost[0])
        if batch.labels is not None and not batch.filler and not bool((batch.labels != IGNORE).any()):
            raise DeloError(
                "A batch has no answer token to train on.",
                given=", ".join(batch.record_ids),
                fix="give these records an answer",
            )
        found = {} if views is None else views(items)
        shown_again = {name: self._view(view, (items or lost)[0]) for name, view in found.items()}
        return replace(batch, views=shown_again)

    __call__ = collate

    def _usable(self, items: Sequence[Item]) -> tuple[Sequence[Item], list[Item]]:
        """The items to train on and those left out, whose images cannot be used."""
        if not self.skip_bad_images:
            return items, []
        lost = []
        for record, has in items:
            try:
                self._image(record, has[0] and record.image is not None)
            except UnusableImage as error:
                self.bad_images[f"{record.task}/{record.id}"] = error.message
                lost.append((record, has))
        return [item for item in items if item not in lost], lost

    def _view(self, view: View, other: Item) -> BatchView:
        """A collated view; one without rows becomes a filler, so that every rank runs the same forwards."""
        batch = self._batch(view.items) if view.items else self._filler(other)
        return BatchView(torch.tensor(view.rows, dtype=torch.int64), batch)

    def _filler(self, item: Item) -> Batch:
        """A record without its image, of which nothing is trained."""
        batch = self._batch([(item[0], (False, item[1][1]))])
        assert batch.labels is not None
        return replace(batch, labels=torch.full_like(batch.labels, IGNORE), cut={}, filler=True)

    def _batch(self, items: Sequence[Item]) -> Batch:
        records = [record for record, _ in items]
        presence = [shown(item) for item in items]
        images = [self._image(record, has[0]) for record, has in zip(records, presence, strict=True)]
        rows = self.layout(records, presence, [None if image is None else image.layout for image in images])
        given = [(row, image) for row, image in enumerate(images) if image is not None]
        tensors = self._pad(rows)
        inputs = {"input_ids": tensors["ids"], "attention_mask": tensors["mask"]}
        for key in given[0][1].inputs if given else ():
            inputs[key] = torch.cat([image.inputs[key] for _, image in given])
        kept = [image.kept for _, image in given if image.kept is not None]
        return Batch(
            inputs=inputs | self.backbone.sequence_inputs(tensors["kinds"], tensors["trained"]),
            labels=None if self.generation else tensors["labels"],
            segments=tensors["kinds"],
            presence=torch.tensor(presence, dtype=torch.bool).reshape(-1, 2),
            image_rows=torch.tensor([row for row, _ in given], dtype=torch.int64),
            image_units=torch.tensor([image.units for _, image in given], dtype=torch.int64),
            image_kept=torch.cat(kept) if kept else None,
            record_ids=[record.id for record in records],
            tasks=[record.task for record in records],
            answers=[record.answer for record in records],
            cut={place: row.cut for place, row in enumerate(rows) if row.cut},
            items=items,
            again=self.collate,
        )

    def _image(self, record: Record, present: bool) -> EncodedImage | None:
        """The record's image as model inputs, the dummy, or None for no image tokens.

        Raises:
            UnusableImage: it cannot be read, or takes all the room that there is.
        """
        path = record.image if present else None
        if path is None and self.image_mode == "absent":
            return None

        def encode() -> EncodedImage:
            picture = dummy_image() if path is None else load_image(path, record)
            try:
                return self.backbone.encode_image(self.processor, picture)
            except ValueError as error:
                raise image_error(path, record, str(error)) from error

        encoded = self._cache.get(path, encode)
        tokens = encoded.tokens(self.backbone.image_token)
        if path is not None and (told := takes_all_room(tokens, self.max_length)):
            raise image_error(path, record, told)
        return encoded

    def layout(
        self, records: list[Record], presence: list[tuple[bool, bool]], images: Sequence[Layout | None]
    ) -> list[Row]:
        """Every record tokenised, its placeholder expanded to its image's layout, and cut to `max_length`."""
        token = self.backbone.image_token
        prompts = [
            self.dialogue.prompt(
                None if image is None else token, record.context if has_text else None, record.instruction
            )
            for record, (_, has_text), image in zip(records, presence, images, strict=True)
        ]
        suffixes = ["" if self.generation else self.dialogue.answer(r.answer.strip()) for r in records]
        texts = [
            "".join(text for text, _ in prompt) + suffix
            for prompt, suffix in zip(prompts, suffixes, strict=True)
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = []
        for i, record in enumerate(records):
            if any(map(self._control.search, (record.context or "", record.instruction, record.answer))):
                ids, kinds = self._apart(prompts[i], record)
            else:
                ids = encoded["input_ids"][i]
                kinds = token_kinds(texts[i], encoded["offset_mapping"][i], prompts[i], record)
            row = self._expand(ids, kinds, images[i] or (), record)
            fit(row, record, kinds.count(None), self.max_length, self.rooms.get(record.task, NEW_TOKENS))
            rows.append(row)
        return rows

    def _apart(self, prompt: Sequence[tuple[str, int]], record: Record) -> tuple[list[int], list[int | None]]:
        """Token ids and kinds of a record whose own words look like control tokens (`</s>`, `<|im_end|>`):
        piece by piece, the words split into plain ones, so that they neither end nor open anything. An image
        token among them stays one, and is refused later.
        """
        lead, end = self.dialogue.lead, self.dialogue.end
        answer = [] if self.generation else [(lead, None), (record.answer.strip(), SAID), (end, None)]
        ids: list[int] = []
        kinds: list[int | None] = []
        for text, kind in [*prompt, *answer]:
            plain = kind in (SEGMENT_CONTEXT, SEGMENT_INSTRUCTION, SAID)
            plain = plain and self.backbone.image_token not in text
            found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
            ids += found
            kinds += [None if kind == SAID else kind] * len(found)
        return ids, kinds

    def _expand(self, ids: list[int], kinds: list[int | None], image: Layout, record: Record) -> Row:
        """The placeholder -> the image's layout; BOS in front where the dialogue has one."""
        row = Row([], [], [])
        if self.dialogue.bos:
            row.extend(1, self.tokenizer.bos_token_id, SEGMENT_OTHER, False)
        answerable = bool(record.answer.strip())
        for token, kind in zip(ids, kinds, strict=True):
            if (token == self._image_id) != (kind == SEGMENT_IMAGE):
                raise DeloError(
                    f"The text of record {record.id!r} holds the image placeholder.",
                    given=self.backbone.image_token,
                    fix="remove it from the text",
                )
            if kind == SEGMENT_IMAGE:
                self._lay(row, image)
            else:
                row.extend(1, token, kind or SEGMENT_OTHER, kind is None and answerable)
        return row

    def _lay(self, row: Row, image: Layout) -> None:
        """Append an image: its tokens, and what stands around and between them."""
        for text, copies in image:
            if text == self.backbone.image_token:
                row.extend(copies, self._image_id, SEGMENT_IMAGE, False)
                continue
            for token in self._ids(text) * copies:
                row.extend(1, token, SEGMENT_OTHER, False)

    def _pad(self, rows: list[Row]) -> dict[str, Tensor]:
        """Rectangular tensors B×S of ids, mask, kinds, which are trained, labels."""
        width = max(len(row.ids) for row in rows)
        shape = (len(rows), width)
        ids = torch.full(shape, self._pad_id, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        kinds = torch.full(shape, SEGMENT_OTHER, dtype=torch.uint8)
        trained = torch.zeros(shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            span = slice(width - len(row.ids), width) if self.generation else slice(0, len(row.ids))
            ids[i, span], mask[i, span] = torch.tensor(row.ids), 1
            kinds[i, span] = torch.tensor(row.kinds, dtype=torch.uint8)
            trained[i, span] = torch.tensor(row.trained)
        labels = ids.masked_fill(~trained, IGNORE)
        return {"ids": ids, "mask": mask, "kinds": kinds, "trained": trained, "labels": labels}


def takes_all_room(tokens: int, max_length: int) -> str | None:
    """Why a picture of so many tokens cannot be used; None for one that leaves any room."""
    if tokens < max_length:
        return None
    return (
        f"it becomes {tokens} tokens, and data.max_length is {max_length} (data.max_pixels and "
        "data.max_tiles make pictures of some families smaller)"
    )
