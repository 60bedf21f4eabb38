"""A check of a sequence's data before anything is trained on it; `faults.py` lists what it looks for."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from time import localtime, strftime

from delo_llava.data.readers import read_records
from delo_llava.data_tools.decode import judge, judge_all
from delo_llava.data_tools.faults import REFUSED, Fault
from delo_llava.data_tools.forms import reference_faults
from delo_llava.data_tools.ledger import Ledger
from delo_llava.data_tools.links import Links
from delo_llava.data_tools.progress import progress
from delo_llava.data_tools.prompts import Prompts
from delo_llava.data_tools.sides import absent, unmatched
from delo_llava.data_tools.trial import Trial
from delo_llava.data_tools.walk import BrokenFile, Entry, walk
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file
from delo_llava.tasks import Record, Split, TaskSequence, TaskSpec

#: Seconds between two writes to the disk.
SAVE_EVERY = 2.0


@dataclass
class Part:
    """One (task, split): what it holds.

    Attributes:
        entries: conversations or questions; one with several turns is several records.
        turns: most turns of one entry.
        without_image, without_context: records that lack the field.
        images: distinct image files.
        trained: tokens that would be trained, over all records.
        cut: records whose `context` or `instruction` does not fit `data.max_length`.
        sha256: of the annotation file.
        refused: the file has faults for which the reader refuses it.
        turns_repeated, first_repeated: turns that say the same as an earlier one of their conversation, and
            the (entry, record) of the first.
    """

    task: TaskSpec
    split: Split
    sha256: str
    entries: int = 0
    records: int = 0
    turns: int = 0
    without_image: int = 0
    without_context: int = 0
    images: int = 0
    trained: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    refused: bool = False
    turns_repeated: int = 0
    first_repeated: tuple[int, str] | None = None

    @property
    def file(self) -> str:
        """The annotation file."""
        return str(self.task.files[self.split])

    @property
    def name(self) -> str:
        """How the part is called: `task/split`."""
        return f"{self.task.name}/{self.split}"


class Check:
    """One check of one sequence.

    Args:
        ledger: what was found before, and what is found now.
        prompts: tokenizer and length to try prompts with; None leaves that out.
        workers: processes that decode images.

    Attributes:
        decoded, known: images decoded now, and those whose verdict was known from before.
    """

    def __init__(
        self, sequence: TaskSequence, ledger: Ledger, prompts: Prompts | None, workers: int = 1
    ) -> None:
        self.sequence, self.ledger, self.prompts, self.workers = sequence, ledger, prompts, workers
        self.decoded = self.known = 0

    def run(self) -> list[Part]:
        """Check everything; faults are in the ledger afterwards.

        Raises:
            DeloError: only for what stops the check itself, not for faults of the data.
        """
        parts = [self._read(task, split) for task in self.sequence.tasks for split in task.files]
        self._images()
        self.ledger.add_bad_images()
        self.ledger.index()
        self.ledger.add_overlaps()
        self._shared()
        distinct = self.ledger.image_counts()
        for part in parts:
            part.images = distinct.get((part.task.name, part.split), 0)
            self._records(part)
        return parts

    def _tell(self, part: Part, code: str, entry: int | None, record: str | None, message: str) -> None:
        self.ledger.add(Fault(code, part.task.name, part.split, part.file, entry, record, message))
        part.refused = part.refused or code in REFUSED

    # The files.

    def _read(self, task: TaskSpec, split: Split) -> Part:
        """Walk one file: schema, ids, repetitions; its images are noted for later."""
        part = Part(task, split, sha256_file(task.files[split]))
        before, links = self.ledger.annotation(part.file, part.sha256), Links(task.image_root)
        with progress(f"reading {part.name}") as advance:
            try:
                for entry in walk(task, split):
                    self._entry(part, entry)
                    links.look(entry)
                    advance()
            except BrokenFile as error:
                self._tell(part, "file_unreadable", None, None, str(error))
        if before is not None:
            told = strftime("has changed since the check of %Y-%m-%d %H:%M", localtime(before))
            self._tell(part, "annotations_changed", None, None, told)
        for number, name, told in links.outside():
            self._tell(part, "link_outside", number, name, told)
        for told in unmatched(task, split):
            self._tell(part, "side_unmatched", None, None, told)
        for told in absent(task) if split == "train" else ():
            self._tell(part, "side_absent", None, None, told)
        if part.first_repeated:
            told = f"{part.turns_repeated} turns ask and answer what an earlier turn of theirs does"
            self._tell(part, "turn_repeated", *part.first_repeated, told)
        self.ledger.forget_uses()
        self.ledger.save()
        return part

    def _entry(self, part: Part, entry: Entry) -> None:
        """Count one entry and note what is wrong with it."""
        part.entries += 1
        part.records += len(entry.records)
        part.turns = max(part.turns, len(entry.records))
        for code, message in entry.faults:
            self._tell(part, code, entry.number, entry.id, message)
        if first := self.ledger.first_use("id", _digest(entry.id), entry.number, entry.id):
            told = f"entry {first[0]} has this id too"
            self._tell(part, "id_repeated", entry.number, entry.id, told)
        if entry.image is not None:
            where = (part.task.name, part.split, part.file, entry.number, entry.id)
            self.ledger.refer(str(entry.image), *where)
        for record in entry.records:
            content = _digest(record.image, record.context, record.instruction, record.answer)
            first = self.ledger.first_use("record", content, entry.number, record.id)
            if first and first[0] == entry.number:
                part.turns_repeated += 1
                part.first_repeated = part.first_repeated or (entry.number, record.id)
            elif first:
                told = f"says the same as entry {first[0]} (id {first[1]})"
                self._tell(part, "record_repeated", entry.number, record.id, told)

    # The images.

    def _images(self) -> None:
        """Decode every image whose verdict is not known; a check that was killed goes on here."""
        todo = [path for path in self.ledger.images() if not self._is_known(path)]
        with progress("decoding images", len(todo)) as advance:
            for verdicts in judge_all(todo, self.workers):
                self.ledger.judged(verdicts)
                self.ledger.save(SAVE_EVERY)
                self.decoded += len(verdicts)
                advance(len(verdicts))
        self.ledger.save()

    def _is_known(self, path: str) -> bool:
        """Whether the file was judged before in its present state; one that is not there never was."""
        with suppress(OSError, ValueError):
            status = os.stat(path)
            if self.ledger.knows(path, status.st_size, status.st_mtime_ns):
                self.known += 1
                return True
        return False

    def _shared(self) -> None:
        """Say where the images of one task's test are another's training."""
        tests = {task.name: task.files.get("test") for task in self.sequence.tasks}
        for tested, trained, number in self.ledger.shared():
            told = f"{number} images of this test are also trained on in {trained}"
            fault = Fault("shared_across_tasks", tested, "test", str(tests[tested]), None, None, told)
            self.ledger.add(fault)

    # The records.

    def _records(self, part: Part) -> None:
        """What the reader makes of a file, the form of references, and the tokens of every prompt."""
        form = reference_faults(part.task.scorer) if part.split != "train" else None
        trial = None
        if self.prompts is not None:
            trial = Trial(self.prompts, self._size, lambda *told: self._tell(part, *told))
        records = self._as_read(part)
        with progress(f"trying {part.name}", part.records) as advance:
            for number, record in records:
                part.without_image += record.image is None
                part.without_context += record.context is None
                for code, message in form(record) if form else ():
                    self._tell(part, code, number, record.id, message)
                if trial is not None:
                    trial.add(number, record)
                advance()
        if trial is not None:
            trial.finish()
            part.trained, part.cut = trial.trained, trial.cut

    def _size(self, path: str) -> tuple[int, int] | None:
        """Width and height of an image, None where it cannot be used.

        Pictures embedded in a data file get their path from the reader: they are judged here.
        """
        size = self.ledger.size(path)
        if size is None:
            verdict = judge(path)
            self.ledger.judged([verdict])
            size = (verdict.width, verdict.height)
        return size if size[0] else None

    def _as_read(self, part: Part) -> Iterator[tuple[int, Record]]:
        """(entry, record) as the reader has them; where it refuses the file, those that are whole."""
        whole = self._whole(part)
        if part.refused:
            return whole
        try:
            records = read_records(part.task, part.split)
        except DeloError as error:
            self._tell(part, "file_unreadable", None, None, f"the reader refuses it: {error.message}")
            return whole
        if len(records) != part.records:
            told = f"the reader makes {len(records)} records of it, the check {part.records}"
            self._tell(part, "file_unreadable", None, None, told)
        return ((number, record) for (number, _), record in zip(whole, records, strict=False))

    def _whole(self, part: Part) -> Iterator[tuple[int, Record]]:
        """(entry, record) of the turns that are whole, up to where the file breaks."""
        with suppress(BrokenFile):
            for entry in walk(part.task, part.split):
                for record in entry.records:
                    yield entry.number, record


def _digest(*values: object) -> bytes:
    """A short hash of values."""
    return hashlib.blake2b(repr(values).encode(), digest_size=12).digest()
