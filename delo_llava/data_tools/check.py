"""A check of a sequence's data before anything is trained on it; `faults.py` lists what it looks for."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from time import localtime, strftime

from delo_llava.data.cmml import part_of
from delo_llava.data.faults import in_a_line
from delo_llava.data.readers import open_reading, read_records, record_of
from delo_llava.data.rows import Entry
from delo_llava.data_tools.decode import judge_all
from delo_llava.data_tools.faults import Fault
from delo_llava.data_tools.forms import reference_faults, right_answers
from delo_llava.data_tools.links import Links
from delo_llava.data_tools.memory import Memory
from delo_llava.data_tools.progress import progress
from delo_llava.data_tools.prompts import Prompts
from delo_llava.data_tools.trial import Trial
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
        cut: records whose `context`, `instruction` or `answer` does not fit `data.max_length`.
        sha256: of the annotation file.
        extra: names of what is kept for scorers and never shown to a model.
        refused: the file has faults for which the reader refuses it.
        turns_apart, first_apart: records that are later turns of a conversation, and the (entry, record) of
            the first.
        turns_repeated, first_repeated: turns that say the same as an earlier one of their conversation, and
            the (entry, record) of the first.
    """

    task: TaskSpec
    split: Split
    sha256: str = ""
    entries: int = 0
    records: int = 0
    turns: int = 0
    without_image: int = 0
    without_context: int = 0
    images: int = 0
    trained: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    extra: set[str] = field(default_factory=set)
    refused: bool = False
    turns_apart: int = 0
    first_apart: tuple[int, str] | None = None
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

    @property
    def key(self) -> str | None:
        """What `part` is in its entries, where the file has those of other parts too."""
        return None if self.task.classes is None else part_of(self.task.classes, self.split)


class DataCheck:
    """One check of one sequence.

    Args:
        memory: what was found before, and what is found now.
        prompts: tokenizer and length to try prompts with; None leaves that out.
        workers: processes that decode images.

    Attributes:
        decoded, known: images decoded now, and those whose verdict was known from before.
    """

    def __init__(
        self, sequence: TaskSequence, memory: Memory, prompts: Prompts | None, workers: int = 1
    ) -> None:
        self.sequence, self.memory, self.prompts, self.workers = sequence, memory, prompts, workers
        self.decoded = self.known = 0

    def run(self) -> list[Part]:
        """Check everything; faults are in the memory afterwards.

        Raises:
            DeloError: only for what stops the check itself, not for faults of the data.
        """
        parts = [Part(task, split) for task in self.sequence.tasks for split in task.files]
        for group in _by_file(parts):
            self._read(group)
        self._images()
        self.memory.add_bad_images()
        self.memory.index()
        self.memory.add_overlaps()
        self._shared()
        distinct = self.memory.image_counts()
        for part in parts:
            part.images = distinct.get((part.task.name, part.split), 0)
            self._records(part)
        return parts

    def _tell(self, part: Part, code: str, entry: int | None, record: str | None, message: str) -> None:
        self.memory.add(Fault(code, part.task.name, part.split, part.file, entry, record, message))

    # The files.

    def _read(self, group: list[Part]) -> None:
        """Read one file: schema, ids, repetitions; its images are noted for later."""
        first, by_key = group[0], {part.key: part for part in group}
        digest = sha256_file(first.task.files[first.split])
        for part in group:
            part.sha256 = digest
        before, links = self.memory.annotation(first.file, digest), Links(first.task.images_of(first.split))
        if before is not None:
            told = strftime("has changed since the check of %Y-%m-%d %H:%M", localtime(before))
            self._tell(first, "annotations_changed", None, None, told)

        def tell(error: DeloError) -> None:
            self._tell(first, "file_unreadable", None, None, in_a_line(error))
            for part in group:
                part.refused = True

        reading = open_reading(first.task, first.split, tell)
        with progress(f"reading {first.name}") as advance:
            for entry in reading:
                # An entry that does not say whose it is counts for the first; those of others are left out.
                of = first if entry.part is None else by_key.get(entry.part)
                if of is not None:
                    self._entry(of, entry, links)
                advance()
        for number, name, told in links.outside():
            self._tell(first, "link_outside", number, name, told)
        for told in reading.joined.unmatched():
            self._tell(first, "side_unmatched", None, None, told)
        for part in group:
            self._finish(part)
        self.memory.forget_uses()
        self.memory.save()

    def _finish(self, part: Part) -> None:
        """What is told of a part once its file has been read."""
        for told in part.task.absent if part.split == "train" else ():
            self._tell(part, "side_absent", None, None, told)
        if part.first_apart:
            told = f"{part.turns_apart} records are later turns, each shown without the turns before it"
            self._tell(part, "turns_apart", *part.first_apart, told)
        if part.first_repeated:
            told = f"{part.turns_repeated} turns ask and answer what an earlier turn of theirs does"
            self._tell(part, "turn_repeated", *part.first_repeated, told)

    def _entry(self, part: Part, entry: Entry, links: Links) -> None:
        """Count one entry and note what is wrong with it."""
        part.entries += 1
        part.records += len(entry.rows)
        part.turns = max(part.turns, len(entry.rows))
        if len(entry.rows) > 1:
            part.turns_apart += len(entry.rows) - 1
            part.first_apart = part.first_apart or (entry.number, entry.rows[1]["id"])
        part.extra |= entry.extra
        part.refused = part.refused or bool(entry.faults)
        for fault in entry.faults:
            self._tell(part, fault.code, entry.number, entry.id, in_a_line(fault))
        if earlier := self._first_use(part, "id", (entry.id,), entry.number, entry.id):
            told = f"entry {earlier[0]} has this id too"
            self._tell(part, "id_repeated", entry.number, entry.id, told)
        if entry.image is not None:
            where = (part.task.name, part.split, part.file, entry.number, entry.id)
            image = part.task.images_of(part.split) / entry.image
            self.memory.refer(str(image), *where)
            links.look(image, entry.number, entry.id)
        for row in () if entry.faults else entry.rows:  # of one with faults, a part may be lost
            content = tuple(row[name] for name in ("image", "context", "instruction", "answer"))
            earlier = self._first_use(part, "record", content, entry.number, row["id"])
            if earlier and earlier[0] == entry.number:
                part.turns_repeated += 1
                part.first_repeated = part.first_repeated or (entry.number, row["id"])
            elif earlier:
                told = f"says the same as entry {earlier[0]} (id {earlier[1]})"
                self._tell(part, "record_repeated", entry.number, row["id"], told)

    def _first_use(
        self, part: Part, kind: str, values: tuple[object, ...], entry: int, record: str
    ) -> tuple[int, str] | None:
        """The (entry, record) of this part that had these values first, or None and they are remembered."""
        digest = hashlib.blake2b(repr(values).encode(), digest_size=12).digest()
        return self.memory.first_use(f"{kind} {part.key}", digest, entry, record)

    # The images.

    def _images(self) -> None:
        """Decode every image whose verdict is not known; a check that was killed goes on here."""
        todo = [path for path in self.memory.images() if not self._is_known(path)]
        with progress("decoding images", len(todo)) as advance:
            for verdicts in judge_all(todo, self.workers):
                self.memory.judged(verdicts)
                self.memory.save(SAVE_EVERY)
                self.decoded += len(verdicts)
                advance(len(verdicts))
        self.memory.save()

    def _is_known(self, path: str) -> bool:
        """Whether the file was judged before in its present state; one that is not there never was."""
        with suppress(OSError, ValueError):
            status = os.stat(path)
            if self.memory.knows(path, status.st_size, status.st_mtime_ns):
                self.known += 1
                return True
        return False

    def _shared(self) -> None:
        """Say where the images of one task's test are another's training."""
        tests = {task.name: task.files.get("test") for task in self.sequence.tasks}
        for tested, trained, number in self.memory.shared():
            told = f"{number} images of this test are also trained on in {trained}"
            fault = Fault("shared_across_tasks", tested, "test", str(tests[tested]), None, None, told)
            self.memory.add(fault)

    # The records.

    def _records(self, part: Part) -> None:
        """What the reader makes of a file, the form of references, and the tokens of every prompt."""
        form = reference_faults(part.task) if part.split != "train" else None
        trial = None
        if self.prompts is not None:
            right, room = right_answers(part.task, part.split), part.task.max_new_tokens
            trial = Trial(self.prompts, self._size, right, room, lambda *told: self._tell(part, *told))
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
            self._omitted(part, trial)

    def _omitted(self, part: Part, trial: Trial) -> None:
        """Say what of a part's texts is cut, and which answers are too long to be generated."""
        if trial.first_cut:
            counts = ", ".join(f"{count} {name}s" for name, count in part.cut.items() if count)
            told = f"cut to data.max_length={trial.prompts.max_length}: {counts}"
            self._tell(part, "text_cut", *trial.first_cut, told)
        if trial.first_long:
            told = f"{trial.long} of {part.records} answers are longer than max_new_tokens={trial.room}"
            if part.split != "train":
                told = f"{told}, in every form that counts"
            self._tell(part, "answer_long", *trial.first_long, told)

    def _size(self, path: str) -> tuple[int, int] | None:
        """Width and height of an image, None where it cannot be used."""
        size = self.memory.size(path)
        return size if size and size[0] else None

    def _as_read(self, part: Part) -> Iterator[tuple[int, Record]]:
        """(entry, record) as training has them; where it refuses the file, those that are whole."""
        if not part.refused:
            try:
                records = read_records(part.task, part.split)
            except DeloError as error:  # a file of many tasks that has no item of this one
                self._tell(part, "file_unreadable", None, None, in_a_line(error))
                return
            yield from zip(records.entries.tolist(), records, strict=True)
            return
        for entry in open_reading(part.task, part.split, lambda _: None):
            if entry.part == part.key:
                yield from ((entry.number, record_of(part.task, part.split, row)) for row in entry.rows)


def _by_file(parts: list[Part]) -> list[list[Part]]:
    """Parts that one reading serves: those of a file of many tasks together, others each by itself."""
    groups: dict[object, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.name if part.key is None else part.file, []).append(part)
    return list(groups.values())
