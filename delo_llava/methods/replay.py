"""`replay`: sequential LoRA that goes over some records of every earlier task.

Specification: baselines, "Replay"; newer_methods, section 14. After a task, `kept` of its training records
are remembered, drawn evenly by a hash of seed, task and id, so that the draw depends neither on ranks nor on
the order of the file. A later stage minimises the same loss on its own records mixed with all that is
remembered: taken in with the others once an epoch, or as a fixed share of every batch.

What is kept are ids and hashes, not records: `memory.json` in the stage's folder. The records are read from
the earlier task's training file again, under the run's missing pattern, so a modality that was missing stays
missing; one that is gone or has changed is an error that names it. Test records are never read.

needs_task: no; encoders: none; mergeable: yes; bytes per task: about 100 per kept record. Faithful to the
method; released ports keep the first records that one rank saw (not an even draw), which is not reproduced.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from delo_llava.data.examples import Examples
from delo_llava.data.missing import hash_rank
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file, write_json_atomic
from delo_llava.methods._lowrank import LowRankOptions
from delo_llava.methods.base import Mixture, Part, Stage, StagePlan
from delo_llava.methods.lora import Lora
from delo_llava.strict import read_json
from delo_llava.tasks import Record, TaskSequence

MEMORY = "memory.json"
#: task -> id of a kept record -> hash of what it says and shows.
Memory = dict[str, dict[str, str]]


class ReplayOptions(LowRankOptions):
    """Options of replay.

    Attributes:
        kept: training records remembered of each task (all, where a task has fewer).
        share: part of every global batch that is drawn from memory, evenly over all that is remembered; None
            adds the remembered records to the stage's own, so that each is seen once an epoch.
    """

    kept: int = Field(20, ge=1)
    share: float | None = Field(None, gt=0, lt=1)


class Replay(Lora):
    """`lora` whose stages also train on what earlier ones remembered."""

    Config = ReplayOptions

    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        """One per task.

        Raises:
            DeloError: of a later task's global batch, memory or the task itself would have no record.
        """
        share = self.options.share
        for name in sequence.names[1:] if share is not None else ():
            batch = self.run.for_task(name).train.global_batch
            if not 0.5 < share * batch < batch - 0.5:
                raise DeloError(
                    f"A share of the global batch of {name} is not even one record",
                    given=f"replay.share={share} of train.global_batch={batch}",
                    fix="a larger train.global_batch, or a share nearer to one half",
                )
        return super().stages(sequence)

    def mixture(self, stage: Stage, own: Examples, past: Mapping[str, Examples]) -> Mixture:
        self._memory = remember(own, self.options.kept, self.run.seed)
        memory, share = recall_all(stage, past), self.options.share
        if not len(memory):
            return (Part(own),)
        if share is None:
            return (Part(own), Part(memory))
        return (Part(own, 1 - share), Part(memory, share))

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        write_json_atomic(folder / MEMORY, self._memory)


def remember(examples: Examples, count: int, seed: int) -> Memory:
    """`count` records of every task, drawn by the hash of seed, task and id, with the hash of each."""
    by_task: dict[str, list[tuple[bytes, str, int]]] = {}
    for index, (task, name) in enumerate(examples.names):
        by_task.setdefault(task, []).append((hash_rank(seed, task, "train", name), name, index))
    return {
        task: {name: record_hash(examples[index][0]) for _, name, index in sorted(ranked)[:count]}
        for task, ranked in by_task.items()
    }


def recall_all(stage: Stage, past: Mapping[str, Examples]) -> Examples:
    """What all stages before `stage` remembered; none in the first one.

    Raises:
        DeloError: as `recall`.
    """
    parts = (recall(examples, stage.past[name].folder / MEMORY) for name, examples in past.items())
    return sum(parts, start=Examples())


def recall(examples: Examples, file: Path) -> Examples:
    """The remembered ones among an earlier stage's examples.

    Raises:
        DeloError: the memory cannot be read, or a record in it is gone or has changed.
    """
    memory: Memory = read_json(file, "A replay memory", fix="train the stage again")
    wanted = {(task, name): told for task, kept in memory.items() for name, told in kept.items()}
    found = {name: index for index, name in enumerate(examples.names) if name in wanted}
    for name, told in wanted.items():
        if name not in found or record_hash(examples[found[name]][0]) != told:
            state = "has changed" if name in found else "is not in its task's training data any more"
            raise DeloError(
                f"A remembered record {state}", given=f"{'/'.join(name)}, kept by {file.parent.name}",
                fix="put the task's data back as they were when that stage was trained",
            )  # fmt: skip
    return examples.select(sorted(found.values()))


def record_hash(record: Record) -> str:
    """sha256 of a record's texts and of its image's bytes; a path is no part of it."""
    image = sha256_file(record.image) if record.image is not None and record.image.is_file() else ""
    texts = (record.instruction, record.context or "", record.answer, image)
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()


METHOD = Replay
