"""`replay_small`: sequential LoRA that goes over a few examples of every earlier task, kept as ids and
hashes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from delo_llava.data.examples import Examples
from delo_llava.errors import DeloError
from delo_llava.methods._lowrank import LowRankOptions
from delo_llava.methods.base import Mixture, Part, Stage
from delo_llava.methods.lora import Lora
from delo_llava.tasks import Record

MEMORY = "memory.json"


class Options(LowRankOptions):
    """Attributes:
    kept: examples of each task.
    """

    kept: int = Field(4, ge=1)


def digest(record: Record) -> str:
    """The text of a record, by hash."""
    return hashlib.sha256(
        "\x1f".join((record.instruction, record.context or "", record.answer)).encode()
    ).hexdigest()


class Replay(Lora):
    """The mixture of a stage is its own examples and what earlier stages kept."""

    Config = Options

    def mixture(self, stage: Stage, own: Examples, past: Mapping[str, Examples]) -> Mixture:
        ranked = sorted(range(len(own)), key=lambda i: hashlib.sha256(own[i][0].id.encode()).digest())
        self._kept = {own[i][0].id: digest(own[i][0]) for i in ranked[: self.options.kept]}
        return (Part(own), *(Part(self._remembered(stage.past[name].folder, past[name])) for name in past))

    def _remembered(self, folder: Path, examples: Examples) -> Examples:
        kept = json.loads((folder / MEMORY).read_text())
        found = {record.id: i for i in range(len(examples)) if (record := examples[i][0]).id in kept}
        for name, hashed in kept.items():
            if name not in found or digest(examples[found[name]][0]) != hashed:
                raise DeloError("A remembered record is not what it was", given=name)
        return examples.select(sorted(found.values()))

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        (folder / MEMORY).write_text(json.dumps(self._kept, sort_keys=True))


METHOD = Replay
