"""Records as a run would see them: image, prompt, which tokens are trained, and the modality of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from delo_llava.data.collate import (
    SEGMENT_CONTEXT,
    SEGMENT_IMAGE,
    SEGMENT_INSTRUCTION,
    SEGMENT_OTHER,
)
from delo_llava.data.images import DUMMY_SIZE, FORMATS, BadImage, decode
from delo_llava.data.missing import MissingSpec, record_presence
from delo_llava.data.readers import Records
from delo_llava.data.tokens import Row
from delo_llava.data_tools.prompts import Prompts
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, TaskSpec

#: What the collator's kinds are called.
KINDS = {
    SEGMENT_OTHER: "other",
    SEGMENT_IMAGE: "image",
    SEGMENT_CONTEXT: "context",
    SEGMENT_INSTRUCTION: "instruction",
}


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind that are all trained, or all not.

    Attributes:
        kind: image, context, instruction, or other (template, role words, answer).
        text: what they decode to; an image is its placeholder, once.
        pieces: the tokens as the tokenizer writes them.
    """

    kind: str
    trained: bool
    text: str
    pieces: list[str]

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.pieces)


@dataclass(frozen=True)
class Shown:
    """One record with what becomes of it.

    Attributes:
        facts: of the image file: size, mode, bytes, or why it cannot be used.
        picture: decoded, or None.
        presence: whether (image, context) are left after the missing pattern and what the record lacks.
        prompt: the text that is tokenised, the answer included where it is trained.
        segments: its tokens.
        cut: what `max_length` costs: `context`, `instruction`, `answer`.
    """

    record: Record
    facts: str
    picture: Image.Image | None
    presence: tuple[bool, bool]
    prompt: str
    segments: list[Segment]
    cut: list[str]
    scorer: str


def choose(records: Records, count: int, start: int, ids: Sequence[str]) -> list[int]:
    """Indices of the records to show: those with these ids, else `count` from `start` on.

    Raises:
        DeloError: no such record.
    """
    if not ids:
        chosen = list(range(start, min(start + count, len(records))))
        if not chosen:
            raise DeloError("No record is there to show.", given=start, allowed=[f"0-{len(records) - 1}"])
        return chosen
    places = {name: place for place, name in enumerate(records.ids)}
    if unknown := [name for name in ids if name not in places]:
        raise DeloError("There is no such record.", given=unknown[0], allowed=[*records.ids[:5], "…"])
    return [places[name] for name in ids]


def shown(
    task: TaskSpec, records: Records, chosen: Sequence[int], missing: MissingSpec, prompts: Prompts
) -> list[Shown]:
    """The chosen records under a missing pattern, whose draw is over all records of the split."""
    presence = record_presence(missing, records)
    return [_shown(task, records[i], _pair(presence[i]), missing, prompts) for i in chosen]


def _pair(row: Any) -> tuple[bool, bool]:
    return bool(row[0]), bool(row[1])


def _shown(
    task: TaskSpec, record: Record, presence: tuple[bool, bool], missing: MissingSpec, prompts: Prompts
) -> Shown:
    facts, picture = _look(record.image)
    size = None if picture is None or not presence[0] else picture.size
    if size is None and missing.image == "dummy":
        size = DUMMY_SIZE
    [row] = prompts.rows([record], [size], [presence[1]])
    return Shown(
        record=record,
        facts=facts,
        picture=picture,
        presence=presence,
        prompt=prompts.text(record, size is not None, presence[1]),
        segments=segments(row, prompts.tokenizer, prompts.backbone.image_token),
        cut=row.cut,
        scorer=task.scorer,
    )


def segments(row: Row, tokenizer: Any, image_token: str) -> list[Segment]:
    """A tokenised sequence, cut where the kind changes or training begins."""
    found = []
    tokens = zip(row.kinds, row.trained, row.ids, strict=True)
    for (kind, trained), group in groupby(tokens, key=lambda token: (token[0], token[1])):
        ids = [token for *_, token in group]
        text = image_token if kind == SEGMENT_IMAGE else tokenizer.decode(ids, skip_special_tokens=False)
        found.append(Segment(KINDS[kind], trained, text, tokenizer.convert_ids_to_tokens(ids)))
    return found


def _look(path: Path | None) -> tuple[str, Image.Image | None]:
    """What an image file is, and its picture."""
    if path is None:
        return "none", None
    try:
        with Image.open(path, formats=list(FORMATS)) as file:
            facts = f"{file.width}x{file.height}, {file.format} {file.mode}, {path.stat().st_size:,} bytes"
        return facts, decode(path)
    except (OSError, BadImage) as error:
        return f"cannot be used: {error}", None
