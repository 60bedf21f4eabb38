"""The answers to one stage's questions that are on disk: known ones before it, all of them at its end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from delo_eval.answers.code import source_hash
from delo_eval.answers.hashes import FileHashes
from delo_eval.answers.keys import AnswerKeys, model_facts
from delo_eval.answers.question import Question
from delo_eval.answers.store import CellAnswers, StoredAnswer
from delo_eval.harness import generate
from delo_eval.harness.model import StoredRun
from delo_eval.harness.questions import Cell
from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError


@dataclass
class StoredAnswers:
    """The answers to one stage's questions that are on disk, for all its cells.

    Attributes:
        new: answers that this process gave.
    """

    output: Path
    stage: int
    keys: AnswerKeys
    hashes: FileHashes
    skips_bad_images: bool
    new: int = 0
    _cells: dict[tuple[str, str], CellAnswers] = field(default_factory=dict)

    @classmethod
    def open(cls, run: StoredRun, stage: int, ranks: Ranks) -> "StoredAnswers":
        """What the run answered after `stage`; every adapter is proven unchanged.

        Raises:
            DeloError: see `StoredRun.adapters`.
        """
        hashes = FileHashes(run.output, ranks.rank)
        code = source_hash((generate.__name__, *run.plugins))
        facts = model_facts(run.config, run.model_path, run.adapters(stage), ranks.device.type, code, hashes)
        skips = run.config.data.on_bad_image == "skip"
        return cls(run.output, stage, AnswerKeys(facts, hashes), hashes, skips)

    def of(self, cell: Cell) -> CellAnswers:
        """The file of one cell."""
        name = cell.pattern, cell.task.name
        return self._cells.setdefault(name, CellAnswers(self.output, self.stage, *name))

    def known(self, file: CellAnswers) -> dict[str, StoredAnswer]:
        """Key -> entry; an image that could not be used is looked at again where that is an error."""
        return {
            key: entry
            for key, entry in file.read().items()
            if self.skips_bad_images or entry[2].image_fault is None
        }

    def forget(self, cells: Sequence[Cell]) -> None:
        """Drop what is stored of `cells`."""
        for cell in cells:
            self.of(cell).forget()

    def gather(self, cell: Cell, asked: Sequence[Question]) -> list[StoredAnswer]:
        """The answers of all ranks to one cell's questions, in their order, joined into one file.

        Raises:
            DeloError: a question has none.
        """
        file = self.of(cell)
        known = self.known(file)
        keys = [self.keys.of(question, cell.task.max_new_tokens) for question in asked]
        lacking = [q.record.id for key, q in zip(keys, asked, strict=True) if key not in known]
        if lacking:
            raise DeloError(
                f"{len(lacking)} of {len(asked)} questions of {cell.task.name}/{cell.pattern} have no "
                f"answer, such as {lacking[:5]}.",
                given=file.file,
                fix="evaluate this stage again; the answers that are there stay",
            )
        file.join(self.keys.context, keys, known)
        return [known[key] for key in keys]
