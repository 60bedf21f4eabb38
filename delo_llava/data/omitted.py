"""What is left out of a task's records, counted in one place for training, evaluation and the data check."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: (task, part, record id) of a record whose `context`, `instruction` or `answer` was cut.
Cut = tuple[str, str, str]

#: What each count is called where people read it.
LABELS = {
    "contexts_cut": "contexts cut to data.max_length",
    "instructions_cut": "instructions cut to data.max_length",
    "answers_cut": "trained answers cut to data.max_length",
    "records_skipped": "records without their image, which cannot be used",
    "answers_unended": "answers ended by max_new_tokens",
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
    """

    contexts_cut: int = 0
    instructions_cut: int = 0
    answers_cut: int = 0
    records_skipped: int = 0
    answers_unended: int = 0
    references_long: int = 0

    def counts(self) -> dict[str, int]:
        """Those that are not zero, as run.json and results.json hold them."""
        return {name: count for name, count in asdict(self).items() if count}


def trained_without(cut: Iterable[Cut], bad_images: Iterable[str]) -> dict[str, dict[str, int]]:
    """Task -> counts of what a stage left out, for tasks that lost anything.

    Args:
        bad_images: `task/id` of the records that were skipped.
    """
    lost = Counter((task, f"{part}s_cut") for task, part, _ in cut)
    lost += Counter((name.partition("/")[0], "records_skipped") for name in bad_images)
    tasks = sorted({task for task, _ in lost})
    return {
        task: Omitted(**{name: count for (of, name), count in lost.items() if of == task}).counts()
        for task in tasks
    }


def answered_without(rows: Iterable[Mapping[str, Any]], references_long: int = 0) -> Omitted:
    """What the predictions of one cell say was left out, and how many questions have only references that
    are too long to be said.
    """
    lost: Counter[str] = Counter()
    for row in rows:
        lost.update(f"{part}s_cut" for part in row.get("cut", ()))
        lost.update({"records_skipped": "image_fault" in row, "answers_unended": bool(row.get("unended"))})
    return Omitted(**lost, references_long=references_long)


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
