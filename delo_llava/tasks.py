"""The words every part of the project shares: a record, a task, a sequence of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

#: The two modalities that can be missing, in the order of every presence mask (column 0, column 1).
MODALITIES: tuple[str, str] = ("image", "text")


@dataclass(frozen=True, slots=True)
class Record:
    """One example. `image` and `context` may be absent in the data itself; an instruction never is.

    Attributes:
        id: unique within (task, split).
        image: absolute path of the image file, or None.
        context: the auxiliary text (caption, title, hint, transcript), or None. Only this is "text" for
            missingness.
        instruction: what is asked.
        answer: the reference answer; never empty.
        extra: what else the data says of it, as JSON has it (several answers, a box, an image's size): read
            by scorers, never shown to a model.
    """

    id: str
    task: str
    split: Split
    image: Path | None
    context: str | None
    instruction: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSpec:
    """A task: its files, where its images are, and how answers are scored. Paths are absolute."""

    name: str
    kind: str
    files: dict[Split, Path]
    image_root: Path
    scorer: str = "exact_match"
    max_new_tokens: int = 8


@dataclass(frozen=True)
class TaskSequence:
    """Ordered tasks plus what the recipe says of source, licence and default hyper-parameters."""

    name: str
    tasks: tuple[TaskSpec, ...]
    title: str = ""
    source: str = ""
    licence: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Task names in training order."""
        return [task.name for task in self.tasks]
