"""A check of a sequence's data before anything is trained on it: files, entries, images, counts."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from delo_llava.data.readers import read_records
from delo_llava.errors import DeloError
from delo_llava.tasks import Split, TaskSequence, TaskSpec

#: How the reader marks an id that came before (see `readers.rows`).
REPEATED = re.compile(r"~\d+(#\d+)?$")

#: At most this many examples of one fault are named.
NAMED = 5


@dataclass
class SplitReport:
    """What the check found in one file."""

    task: str
    split: Split
    file: Path
    conversations: int = 0
    records: int = 0
    without_image: int = 0
    without_context: int = 0
    repeated_ids: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line of counts, then one for each fault."""
        counts = f"{self.records} records in {self.conversations} entries"
        lacks = f"{self.without_image} without image, {self.without_context} without context"
        head = f"{self.task}/{self.split}: {counts}; {lacks}; {self.repeated_ids} repeated ids"
        return "\n".join([head, *(f"  fault: {fault}" for fault in self.faults)])


def check_sequence(sequence: TaskSequence) -> Iterator[SplitReport]:
    """Read every file of a sequence: schema, counts, and whether every image that is named exists.

    Yields one report for each (task, split) as it is done; a report with faults is no exception.
    """
    for task in sequence.tasks:
        for split in task.files:
            yield _check(task, split)


def _check(task: TaskSpec, split: Split) -> SplitReport:
    """Read one file; a fault of schema ends its reading, missing images are collected."""
    report = SplitReport(task.name, split, task.files[split])
    try:
        records = read_records(task, split)
    except DeloError as error:
        report.faults.append(error.render())
        return report
    report.conversations, report.records = records.conversations, len(records)
    images: Counter[Path] = Counter()
    for record in records:
        report.without_context += record.context is None
        report.repeated_ids += REPEATED.search(record.id) is not None
        if record.image is None:
            report.without_image += 1
        else:
            images[record.image] += 1
    if missing := [path for path in images if not path.is_file()]:
        names = ", ".join(str(path) for path in missing[:NAMED])
        report.faults.append(
            f"{len(missing)} of {len(images)} images are not there: {names}{' …' * (len(missing) > NAMED)}"
        )
    return report
