"""A record, a collator of every family, and a batch spelled out token by token."""

from functools import cache
from pathlib import Path

import pytest
import tiny_models
from PIL import Image

from delo_llava.backbones.base import find_backbone
from delo_llava.data.collate import IGNORE, Batch, Collator
from delo_llava.tasks import Record

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")
LETTERS = "OICQ"  # other, image, context, question (instruction)
BOTH, NO_IMAGE, NO_TEXT, NEITHER = (True, True), (False, True), (True, False), (False, False)


@cache
def family(kind: str):
    backbone, path = find_backbone(tiny_models.session(kind))
    return backbone, backbone.load_processor(path)


def collator(kind: str = "llava", max_length: int = 512, image_mode: str = "absent", **options) -> Collator:
    return Collator(*family(kind), max_length, image_mode, **options)


@pytest.fixture(name="record")
def science_record(tmp_path: Path) -> Record:
    path = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 80.0).convert("RGB").save(path)
    return Record("r0", "science", "train", path, "hint: six", "which number is shown?", "four")


def change(record: Record, **fields) -> Record:
    return Record(**({name: getattr(record, name) for name in Record.__slots__} | fields))


def spelled(kind: str, batch: Batch, row: int = 0) -> list[tuple[str, str]]:
    """(text, kind) of runs of tokens of one kind (answers: T for trained), as the tokenizer spells them."""
    tokenizer = family(kind)[1].tokenizer
    runs: list[tuple[str, list[int]]] = []
    for i in batch.inputs["attention_mask"][row].nonzero().flatten().tolist():
        trained = batch.labels is not None and batch.labels[row, i] != IGNORE
        letter = "T" if trained else LETTERS[batch.segments[row, i]]
        if not runs or runs[-1][0] != letter:
            runs.append((letter, []))
        runs[-1][1].append(int(batch.inputs["input_ids"][row, i]))
    return [
        ("".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").replace("Ġ", " "), letter)
        for letter, ids in runs
    ]
