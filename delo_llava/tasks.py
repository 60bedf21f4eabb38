"""The words every part of the project shares: a record, a task, a sequence of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

#: The two modalities that can be missing, in the order of every presence mask (column 0, column 1).
MODALITIES: tuple[str, str] = ("image", "text")


#: Tokens that an answer may have where a task does not say.
NEW_TOKENS = 8

#: Key of `Record.extra`: the answer with its surrounding blanks, where it has any.
AS_WRITTEN = "answer_as_written"


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
class SideFile:
    """A file beside a task's records that is joined to them by a key; see `data/sides.py`.

    Attributes:
        name: what it holds, in a few words.
        path: absolute.
        splits: whose records it is joined to.
        shape: `list` of rows, `map` from key to row, or `keys`: a list of bare keys, whose row is true.
        at: dotted place of the rows inside a JSON file; empty: the top.
        key: fields of a row that make its key (`list` only).
        by: what of a record must equal the key: `id`, `number` (of the entry, from 1), `image`,
            `image_name`, `image_stem`, `image_number` (the digits that end the stem), or an entry's field.
        gather: rows of one key are collected: every value becomes a list.
        context: place in a row of what is added to `Record.context`; None adds nothing.
        prefix: put in front of that.
        extra: key in `Record.extra` -> place in a row, as `answers`, `answers[].answer`, `.` (all of it).
    """

    name: str
    path: Path
    splits: tuple[Split, ...] = SPLITS
    shape: Literal["list", "map", "keys"] = "list"
    at: str = ""
    key: tuple[str, ...] = ()
    by: str = "id"
    gather: bool = False
    context: str | None = None
    prefix: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassTask:
    """One task of a class-incremental file that holds all tasks and splits (CMML); see `data/cmml.py`.

    Attributes:
        number: `task_id` of its items.
        per_task: classes that each task adds, in the order of the class index.
        instruction: what every record asks.
        names: JSON file with the class names in the order of their index; None: from the image's folder.
    """

    number: int
    per_task: int
    instruction: str
    names: Path | None = None


@dataclass(frozen=True)
class TaskSpec:
    """A task: its files, where its images are, and how answers are scored. Paths are absolute.

    Attributes:
        max_new_tokens: that an answer may have; prompts leave room for them within `data.max_length`.
        answers: the closed set of answers, where every question has the same one.
        sides: files joined to the records.
        classes: set where the files are in the CMML layout instead of CoIN's.
        absent: optional side files that are not there, each in a line.
        split_roots: image folders of single splits that do not use `image_root`.
        no_answer: what is told where a record has no answer: how the user gets it.
    """

    name: str
    kind: str
    files: dict[Split, Path]
    image_root: Path
    scorer: str = "exact_match"
    max_new_tokens: int = NEW_TOKENS
    answers: tuple[str, ...] = ()
    sides: tuple[SideFile, ...] = ()
    classes: ClassTask | None = None
    absent: tuple[str, ...] = ()
    split_roots: Mapping[Split, Path] = field(default_factory=dict)
    no_answer: str = ""

    def images_of(self, split: Split) -> Path:
        """The folder that `image` entries of a split are relative to."""
        return self.split_roots.get(split, self.image_root)

    @property
    def beside(self) -> dict[str, Path]:
        """Every file besides the records' own that decides what they say, by name."""
        names = {} if self.classes is None or self.classes.names is None else {"classes": self.classes.names}
        return {side.name: side.path for side in self.sides} | names


@dataclass(frozen=True)
class StagePlan:
    """A stage to come: its name (also of its folder) and the tasks whose records it trains on."""

    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class TaskSequence:
    """Ordered tasks plus what the recipe says of source, licence and default hyper-parameters.

    Attributes:
        template: which variant of the instructions was chosen, where the recipe has several.
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    title: str = ""
    source: str = ""
    licence: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    @property
    def names(self) -> list[str]:
        """Task names in training order."""
        return [task.name for task in self.tasks]

    @property
    def rooms(self) -> dict[str, int]:
        """Task -> tokens that an answer may have."""
        return {task.name: task.max_new_tokens for task in self.tasks}
