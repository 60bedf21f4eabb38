"""What is left out of a task's records, counted in one place for training, evaluation and the data check."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: (task, part, record id) of a record whose `context`, `instruction` or `answer` was cut.
Cut = tuple[str, str, str]

#: Numbers of new names that are kept before they are packed.
PENDING = 1 << 16

Numbers = NDArray[np.int64]

#: What each count is called where people read it.
LABELS = {
    "contexts_cut": "contexts cut to data.max_length",
    "instructions_cut": "instructions cut to data.max_length",
    "answers_cut": "trained answers cut to data.max_length",
    "records_skipped": "records without their image, which cannot be used",
    "answers_unended": "answers ended by max_new_tokens",
    "references_missing": "questions left out, whose reference lacks what the scorer needs",
    "references_long": "questions of which every reference answer is longer than max_new_tokens",
}


@dataclass(frozen=True)
class Omitted:
    """How many records of one task and split lost something.

    Attributes:
        contexts_cut, instructions_cut, answers_cut: records of which that was cut to `data.max_length`.
        records_skipped: records whose image cannot be used: left out of training, and counted as wrong
            answers in an evaluation.
        answers_unended: records to which an answer (with the chosen or the true task) was ended by
            `max_new_tokens` instead of an end token.
        references_long: records of which every reference answer that the scorer takes is longer than
            `max_new_tokens`, so that no answer can equal one.
        references_missing: records that are not asked (`eval.on_bad_reference`), as their reference lacks
            what the scorer needs, or the scorer does not count them.
    """

    contexts_cut: int = 0
    instructions_cut: int = 0
    answers_cut: int = 0
    records_skipped: int = 0
    answers_unended: int = 0
    references_long: int = 0
    references_missing: int = 0

    def counts(self) -> dict[str, int]:
        """Those that are not zero, as run.json and results.json hold them."""
        return {name: count for name, count in asdict(self).items() if count}


class CutRecords:
    """Which records were cut, each counted once however often it is shown: eight bytes for each and part.

    A record is known by 64 bits of its id's BLAKE2b hash. That two of a million cut records share them, so
    that one is not counted, has a probability of 3e-8.

    Args:
        packed: (task, part) -> ascending numbers of records, as `packed` gives them.
    """

    def __init__(self, packed: Mapping[tuple[str, str], Numbers] | None = None) -> None:
        self._packed = dict(packed or {})
        self._new: dict[tuple[str, str], set[int]] = {}

    def add(self, cuts: Iterable[Cut]) -> None:
        """Note records that were cut, known or not."""
        for task, part, name in cuts:
            new = self._new.setdefault((task, part), set())
            new.add(int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True))
            if len(new) == PENDING:
                self._pack()

    def packed(self) -> dict[tuple[str, str], Numbers]:
        """(task, part) -> ascending numbers of the records of which that part was cut."""
        self._pack()
        return dict(self._packed)

    def counts(self) -> dict[tuple[str, str], int]:
        """(task, part) -> of how many records it was cut."""
        return {key: len(numbers) for key, numbers in self.packed().items()}

    def union(self, others: Iterable["CutRecords"]) -> "CutRecords":
        """What these and all `others` know."""
        found = CutRecords(self.packed())
        for other in others:
            for key, numbers in other.packed().items():
                found._join(key, numbers)
        return found

    def _pack(self) -> None:
        for key, new in self._new.items():
            self._join(key, np.fromiter(new, np.int64, len(new)))
        self._new = {}

    def _join(self, key: tuple[str, str], numbers: Numbers) -> None:
        self._packed[key] = np.union1d(self._packed.get(key, np.empty(0, np.int64)), numbers)


def trained_without(
    cut: Mapping[tuple[str, str], int], bad_images: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Task -> counts of what a stage left out, for tasks that lost anything.

    Args:
        cut: (task, part) -> of how many records it was cut.
        bad_images: `task/id` of the records that were skipped.
    """
    lost = Counter({(task, f"{part}s_cut"): count for (task, part), count in cut.items()})
    lost += Counter((name.partition("/")[0], "records_skipped") for name in bad_images)
    tasks = sorted({task for task, _ in lost})
    return {
        task: Omitted(**{name: count for (of, name), count in lost.items() if of == task}).counts()
        for task in tasks
    }


def answered_without(
    rows: Iterable[Mapping[str, Any]], references_long: int = 0, references_missing: int = 0
) -> Omitted:
    """What the predictions of one cell say was left out, how many questions have only references that are
    too long to be said, and how many were not asked.
    """
    lost: Counter[str] = Counter()
    for row in rows:
        lost.update(f"{part}s_cut" for part in row.get("cut", ()))
        lost.update({"records_skipped": "image_fault" in row, "answers_unended": bool(row.get("unended"))})
    return Omitted(**lost, references_long=references_long, references_missing=references_missing)


def omitted_lines(found: Mapping[str, Mapping[str, int]], where: str) -> list[str]:
    """One line for each task that lost anything.

    Args:
        found: task -> counts; where: the split, and what is missing in it.
    """
    return [
        f"{task}, {where}: {'; '.join(f'{LABELS[name]}: {count:,}' for name, count in counts.items())}"
        for task, counts in found.items()
        if counts
    ]


def evaluated_lines(results: Mapping[str, Any], stage: str) -> list[str]:
    """What results.json says was left out after a stage (`0`, …, `zero_shot`), a line for each task."""
    patterns = (results.get("omitted") or {}).get(stage, {})
    return [
        line
        for pattern, found in patterns.items()
        for line in omitted_lines(found, results["split"] + ("" if pattern == "run" else f" ({pattern})"))
    ]
