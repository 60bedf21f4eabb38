"""Which answers to a task's records are right: its scorer says so, which belongs to the harness."""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin
from delo_llava.tasks import Record, TaskSpec

#: Records that a message names.
SHOWN = 5


class _Scorer(Protocol):
    """What is asked of a scorer here."""

    def in_mode(self, scoring: str) -> "_Scorer": ...
    def accepted(self, record: Record) -> list[str]: ...
    def unusable(self, records: Sequence[Record]) -> tuple[list[int], str]: ...


def accepted_answers(task: TaskSpec, scoring: str) -> Callable[[Record], list[str]]:
    """A function that lists the texts of which each would be right as the answer to a record, never none; it
    raises a `DeloError` for a reference that the rule cannot use.

    Args:
        scoring: `native` or `compat`, as `eval.scoring`.
    """
    return _scorer(task, scoring).accepted


def usable_records(task: TaskSpec, records: Sequence[Record], scoring: str, on_bad: str) -> list[int]:
    """The numbers of the records that are asked: all, or (`eval.on_bad_reference` is `skip`) those that can
    be scored.

    Raises:
        DeloError: none can be scored.
    """
    bad, why = _scorer(task, scoring).unusable(records) if on_bad == "skip" else ([], "")
    if bad and len(bad) == len(records):
        raise DeloError(f"No question of {task.name} can be scored: {why}", given=task.scorer)
    left_out = set(bad)
    return [number for number in range(len(records)) if number not in left_out]


def require_scorable(task: TaskSpec, records: Sequence[Record], scoring: str) -> None:
    """Refuse records that could not be scored once they have been answered.

    Raises:
        DeloError: there are some; names file, task and ids.
    """
    bad, why = _scorer(task, scoring).unusable(records)
    if bad:
        ids, split = [records[number].id for number in bad], records[bad[0]].split
        raise DeloError(
            f"{task.files[split]} ({task.name}/{split}): {why}",
            given=", ".join(ids[:SHOWN]) + (" …" if len(ids) > SHOWN else ""),
            fix="give them what their scorer needs, or leave them out of the score: "
            "--eval.on_bad_reference=skip",
        )


def _scorer(task: TaskSpec, scoring: str) -> _Scorer:
    return cast(_Scorer, load_plugin("scorer", task.scorer)).in_mode(scoring)
