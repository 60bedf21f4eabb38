"""`missrag`: what a sample lacks is taken from the most similar remembered record, and the prompt says so.

Source: MissRAG (ICCV 2025), training-free, over a plain LoRA that goes through all tasks (`lora`);
specification: newer_methods, section 15. After a task, complete training records are remembered with the
frozen queries of what they show. A row that lacks something asks with what it has:

    stand-in = argmax_j q_v · q_v^j over remembered records j of all seen tasks
    v: the modality that is there; for a row with neither, the instruction

and is answered with the stand-in's image or context in the gap. A line for each modality says which is there
and which is not. Complete rows are answered as `lora` does, to the bit.

needs_task: no (presence alone). encoders: not the paper's joint one but the base's own frozen features, or a
CLIP's by `encoder=FOLDER`. mergeable: no, a merged model would look nothing up. Bytes per task: the
adapter's (of which only the last is used), 12·d per remembered record, and about 100 for its id and hash: the
records are read from the task's training file again, so this is rehearsal, to be listed beside `replay`.

simplified: like is compared with like (an image with images), since the base's features of images and words
have no common space; `kept` records a task, drawn evenly, where the paper keeps all; one stand-in. Not
reproduced: the mean of several items' token sequences; raw scores of different modalities in one list, in
which one record stands several times.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.backbones.base import Backbone
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch
from delo_llava.data.examples import Examples, Item
from delo_llava.data.readers import read_records
from delo_llava.files import write_json_atomic
from delo_llava.methods._encoded import EncodedMethod
from delo_llava.methods._lowrank import ADAPTER, LowRankMethod, LowRankOptions
from delo_llava.methods.base import (
    Capabilities,
    Footprint,
    Mixture,
    Part,
    Passes,
    Past,
    Prompt,
    Reduce,
    Stage,
)
from delo_llava.methods.replay import MEMORY, Memory, recall, remember
from delo_llava.schema import UserPath
from delo_llava.strict import read_json, read_tensors
from delo_llava.tasks import Record

POOL = "pool.safetensors"
#: What a line of the prompt says of a modality that is there, and of one that is not.
THERE, TAKEN, INFER = "given", "missing, one of a similar example is shown", "missing, infer it from the rest"


class MissRagOptions(LowRankOptions):
    """Options of MissRAG.

    Attributes:
        kept: complete training records remembered of each task (all, where a task has fewer).
        retrieve: fill what is missing from the most similar remembered record.
        prompt: tell in the prompt which modality is there, in rows that lack one.
        encoder: a folder with a CLIP whose features are compared; left out, the base's own frozen ones are.
    """

    kept: int = Field(512, ge=1)
    retrieve: bool = True
    prompt: bool = True
    encoder: UserPath | None = None


class MissRag(EncodedMethod, LowRankMethod):
    """`lora` that looks up what is missing."""

    Config = MissRagOptions
    capabilities = Capabilities(answers_as_trained=False)
    unmerged = (
        "a merged model would look nothing up where something is missing",
        "evaluate the run as it is, or train `lora`, whose weights are the same",
    )
    _memory: Memory
    #: Of remembered records, N×3×d, in the order of `_names` (task and id) where they answer.
    _queries: Tensor

    def __init__(self, options: Any, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(options, run, backbone)
        self._past: Mapping[str, Past] = {}
        self._names: list[tuple[str, str]] = []
        self._records: dict[tuple[str, str], Record] = {}

    # ---- a stage
    def mixture(self, stage: Stage, own: Examples, past: Mapping[str, Examples]) -> Mixture:
        complete = own.select(np.flatnonzero(own.presence.all(1)).tolist())
        self._memory = remember(complete, self.options.kept, self.run.seed)
        return (Part(own),)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._past, self._width = {}, self.width(base)
        model = self.continued(base, stage.past) if stage.past else self.fresh(base, ADAPTER)
        return model  # type: ignore[no-any-return]

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """The frozen queries of what is remembered: one pass over the task's examples, towers only."""
        names = in_order(self._memory)
        rows = {name: row for row, name in enumerate(names)}
        sums = torch.zeros(len(names), 3 * self._width + 1)
        for batch in passes.all():
            wanted = [None if batch.filler else rows.get((r.task, r.id)) for r, _ in batch.items]
            if any(row is not None for row in wanted):
                found = torch.cat([*frozen_queries(model, self.inputs(batch), batch.inputs)], 1).cpu()
                for row, query in zip(wanted, found, strict=True):
                    if row is not None:
                        sums[row] += torch.cat([query, query.new_ones(1)])
        sums = reduce(sums)
        self._queries = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).unflatten(1, (3, self._width))

    # ---- what is kept
    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        write_json_atomic(folder / MEMORY, self._memory)
        save_file({"queries": self._queries}, folder / POOL)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        self._past, self._records, self._names = past, {}, []
        if not past:
            return base.requires_grad_(False)
        kept = [read_tensors(stage.folder / POOL, "The remembered queries") for stage in past.values()]
        self._queries = torch.cat([tensors["queries"] for tensors in kept])
        for stage in past.values():
            memory: Memory = read_json(stage.folder / MEMORY, "A replay memory", fix="train the stage again")
            self._names += in_order(memory)
        return self.opened(base, past, only_last=True)  # type: ignore[no-any-return]

    def footprint(self, base: nn.Module) -> Footprint:
        stored = self.options.kept * (12 * self.width(base) + 100)
        return replace(super().footprint(base), stored_bytes=stored)

    # ---- answers
    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        lacking = ~batch.presence.all(1)
        if self._past and bool(lacking.any()) and (self.options.retrieve or self.options.prompt):
            batch = self._filled(model, batch)
        yield Prompt.of(batch)

    def _filled(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with what its rows lack taken from others, and said in their prompts."""
        found: list[int | None] = [None] * len(batch)
        if self.options.retrieve and self._names:
            queries = torch.stack([*frozen_queries(model, self.inputs(batch), batch.inputs)], 1)
            found = [*nearest(queries, batch.presence, self._queries.to(queries.device)).tolist()]
        items = [
            item if all(has) else self._item(item[0], (has[0], has[1]), found[row])
            for row, (item, has) in enumerate(zip(batch.items, batch.presence.tolist(), strict=True))
        ]
        assert batch.again is not None
        return batch.again(items).to(batch.segments.device)

    def _item(self, record: Record, has: tuple[bool, bool], stand_in: int | None) -> Item:
        """A row that lacks something, as it is shown."""
        words = [THERE if there else INFER if stand_in is None else TAKEN for there in has]
        if self.options.prompt:
            told = "".join(f"{part}: {word}.\n" for part, word in zip(("Image", "Text"), words, strict=True))
            record = replace(record, instruction=told + record.instruction)
        if stand_in is None:
            return record, has
        other = self._record(self._names[stand_in])
        image = record.image if has[0] else other.image
        context = record.context if has[1] else other.context
        return replace(record, image=image, context=context), (True, True)

    def _record(self, name: tuple[str, str]) -> Record:
        """A remembered record, as its task's training file has it.

        Raises:
            DeloError: the data cannot be read, or a remembered record is gone or has changed.
        """
        if not self._records:
            for stage in self._past.values():
                read = [read_records(task, "train") for task in stage.tasks]
                all_of_them = Examples(tuple((r, np.ones((len(r), 2), dtype=np.bool_)) for r in read))
                found = recall(all_of_them, stage.folder / MEMORY)
                self._records |= {found.names[i]: found[i][0] for i in range(len(found))}
        return self._records[name]


def nearest(queries: Tensor, presence: Tensor, pool: Tensor) -> Tensor:
    """The remembered record most like each row by what the row has, int64 R; the earlier one in a tie.

    Args:
        queries: R×3×d, of image, text and instruction, of length one; presence: bool R×2.
        pool: N×3×d.
    """
    asked = torch.cat([presence, ~presence.any(1, keepdim=True)], 1).double().unsqueeze(-1)
    scores = torch.einsum("rvd,nvd->rn", queries.double() * asked, pool.double())
    return scores.argmax(1)


def in_order(memory: Memory) -> list[tuple[str, str]]:
    """Task and id of what a stage remembered, in the order of its queries."""
    return sorted((task, name) for task, kept in memory.items() for name in kept)


METHOD = MissRag
