"""Which answers to a task's records are right: its scorer says so, which belongs to the harness."""

from collections.abc import Callable
from typing import Protocol, cast

from delo_llava.registry import load_plugin
from delo_llava.tasks import Record, TaskSpec


class _Scorer(Protocol):
    """What is asked of a scorer here."""

    def in_mode(self, scoring: str) -> "_Scorer": ...
    def accepted(self, record: Record) -> list[str]: ...


def accepted_answers(task: TaskSpec, scoring: str) -> Callable[[Record], list[str]]:
    """A function that lists the texts of which each would be right as the answer to a record, never none; it
    raises a `DeloError` for a reference that the rule cannot use.

    Args:
        scoring: `native` or `compat`, as `eval.scoring`.
    """
    return cast(_Scorer, load_plugin("scorer", task.scorer)).in_mode(scoring).accepted
