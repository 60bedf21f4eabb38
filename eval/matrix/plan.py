"""Which stages a run has and which tasks each trains: what "task j after stage i" means.

Most methods train one stage per task. A joint method has one stage of all tasks; a zero-shot method has none,
and the base itself, stage −1, is its result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from delo_llava.tasks import StagePlan


@dataclass(frozen=True)
class Plan:
    """The stages of a run over the tasks of its sequence.

    Attributes:
        tasks: of the sequence, in its order: the columns of the matrix.
        stages: in the order of training: the rows of the matrix.
    """

    tasks: tuple[str, ...]
    stages: tuple[StagePlan, ...]

    @classmethod
    def one_each(cls, tasks: Sequence[str]) -> "Plan":
        """A stage of its own for every task."""
        return cls(tuple(tasks), tuple(StagePlan(task, (task,)) for task in tasks))

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Plan":
        """The plan in a run.json or results.json; files from before there were plans had a stage per task."""
        if "plan" not in content:
            return cls.one_each(content["tasks"])
        stages = (StagePlan(stage["name"], tuple(stage["tasks"])) for stage in content["plan"])
        return cls(tuple(content["tasks"]), tuple(stages))

    def to_json(self) -> list[dict[str, Any]]:
        """The entry `plan` of results.json."""
        return [{**asdict(stage), "tasks": list(stage.tasks)} for stage in self.stages]

    @property
    def names(self) -> list[str]:
        """Names of the stages."""
        return [stage.name for stage in self.stages]

    def label(self, stage: int) -> str:
        """A stage as people are told of it everywhere: its place counted from 1, and its name."""
        return f"{stage + 1}. {self.names[stage]}" if stage >= 0 else "zero-shot"

    @property
    def by_word(self) -> dict[str, int]:
        """Words that name a stage -> its index: its name, the index itself, `zero-shot` for the base (−1)."""
        words = {"zero-shot": -1, "-1": -1} | {name: i for i, name in enumerate(self.names)}
        return words | {str(i): i for i in range(len(self.names))}

    @property
    def last(self) -> int:
        """The stage that is the result; −1, the base itself, where nothing is trained."""
        return len(self.stages) - 1

    @property
    def one_task_each(self) -> bool:
        """Whether stage i trains task i and nothing else: what forgetting and transfer are defined for."""
        return [stage.tasks for stage in self.stages] == [(task,) for task in self.tasks]

    @property
    def about(self) -> str:
        """What a reader must know of stages that are not one per task; else empty."""
        if self.one_task_each:
            return ""
        undefined = "forgetting, transfer and averages over stages are not defined"
        if not self.stages:
            return f"no stage is trained, the base itself answers: {undefined}"
        if len(self.stages) == 1:
            return f"one stage trains {len(self.stages[0].tasks)} tasks together: {undefined}"
        return f"{len(self.stages)} stages are not one for each of {len(self.tasks)} tasks: {undefined}"

    def seen(self, stage: int) -> tuple[str, ...]:
        """The tasks trained up to `stage`, in the order of the sequence."""
        known = {task for planned in self.stages[: stage + 1] for task in planned.tasks}
        return tuple(task for task in self.tasks if task in known)

    def judged(self, stage: int) -> tuple[str, ...]:
        """The tasks that the row of `stage` is judged on: those seen, and all of them for the base."""
        return self.seen(stage) if stage >= 0 else self.tasks

    def own(self, task: str) -> int | None:
        """The first stage that trains `task`; None where none does."""
        return next((i for i, stage in enumerate(self.stages) if task in stage.tasks), None)
