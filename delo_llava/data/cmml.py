"""Rows from the CMML layout (RebQ, DeLo): one JSON array with the items of all tasks and splits.

Items are `{"task_id", "split", "image", "text", "label"}`. The label is a class index, a list of class
indices, a 0/1 vector over all classes, or class names; which one it is is decided over the whole file and
told in `extra["label_form"]`. Generated answers are the class name, or several in alphabetical order joined
by commas. As in RebQ's trainer, task k (from 0) knows the classes below `per_task`·(k+1): labels of later
tasks are left out of its answers.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from delo_llava.data.embedded import EmbeddedImages
from delo_llava.data.entries import each_entry, read_entries
from delo_llava.data.faults import BadEntry, Tell, short, stop
from delo_llava.data.layouts import picture_of
from delo_llava.data.rows import Entry, Reading, as_json, place_of
from delo_llava.errors import DeloError
from delo_llava.tasks import SPLITS, ClassTask, Split, TaskSpec

LabelForm = Literal["index", "indices", "vector", "name", "names"]

#: What every item has; further keys become a record's `extra`.
FIELDS = ("task_id", "split", "image", "text", "label")


def part_of(classes: ClassTask, split: Split) -> str:
    """What `part` is in the rows of one task's split."""
    return f"{classes.number}/{split}"


class CmmlReading(Reading):
    """One pass over a CMML file: the items of every task and split, which the entries' `part` tells apart.

    Ids are `<task_id>-<split>-<number of the item in the file>`.

    Raises:
        DeloError: the task does not say which classes it has.
    """

    def __init__(self, task: TaskSpec, split: Split, images: EmbeddedImages, tell: Tell = stop) -> None:
        super().__init__(task, split, images, tell)
        if task.classes is None:
            raise DeloError(f"Task {task.name!r} does not say which classes it has.", fix="add `classes`")
        self.classes = task.classes
        self._form: LabelForm | None = None
        self._names: list[str] = []

    def _begin(self) -> None:
        """The form of the labels and the names of the classes; where these are not told, no item is whole."""
        try:
            self._form = label_form(self.path)
            self._names = _names(self.path, self._form, self.classes)
        except DeloError as error:
            self.tell(error)

    def _entry(self, number: int, given: dict[str, Any]) -> Entry:
        """An item with all that is wrong with it."""
        entry = Entry(number, f"{given.get('task_id')}-{given.get('split')}-{number}")
        with entry.faults:
            entry.part = _part(given)
        if entry.part is None:
            return entry
        context, labels = None, list[int]()
        with entry.faults:
            _require_fields(given)
        with entry.faults:
            entry.image = place_of(picture_of(given), self.root, self.images)
        with entry.faults:
            context = _text(given.get("text"))
        with entry.faults:
            labels = self._labels(given)
        extra = {key: value for key, value in given.items() if key not in FIELDS and value is not None}
        extra |= self._known_of(given, labels) if labels else {}
        entry.extra, text = extra.keys(), ""
        with entry.faults:
            text = as_json(extra)
        if not entry.faults and labels:
            entry.rows.append(
                {
                    "id": entry.id,
                    "image": entry.image,
                    "context": context,
                    "instruction": self.classes.instruction,
                    "answer": ", ".join(extra["labels"]),
                    "extra": text,
                    "entry": number,
                    "part": entry.part,
                }
            )
        return entry

    def _labels(self, item: Mapping[str, Any]) -> list[int]:
        """The classes of an item that its task knows, in order; none where the form is not known."""
        label = item.get("label")
        if _kind(label) is None:
            raise BadEntry("label_form", "this label is not understood.", given=short(label))
        if self._form is None or not self._names:
            return []
        known = self._known(item)
        labels = [index for index in _indices(label, self._form, self._names) if index < known]
        if not labels:
            raise BadEntry(
                "label_form",
                "none of its labels belongs to its task or an earlier one.",
                given=f"task_id {item['task_id']}, label {short(label)}",
                fix="check the order of the class names and `per_task` in the recipe",
            )
        return labels

    def _known(self, item: Mapping[str, Any]) -> int:
        task: int = item["task_id"]
        return min(self.classes.per_task * (task + 1), len(self._names))

    def _known_of(self, item: Mapping[str, Any], labels: list[int]) -> dict[str, Any]:
        """What scorers are told of an item with these classes."""
        told = {
            "labels": sorted(self._names[index] for index in labels),
            "label_ids": labels,
            "label_form": self._form,
        }
        return told if item["split"] == "train" else told | {"classes": self._names[: self._known(item)]}


def label_form(path: Path) -> LabelForm | None:
    """How a file writes its labels, decided over all items whose label is understood; None where none is.

    A list is a vector when all lists have one length above one and hold only 0 and 1, each at least one 1,
    and indices otherwise.

    Raises:
        DeloError: labels of several kinds.
    """
    kinds: set[str] = set()
    lengths: set[int] = set()
    vector = True
    for number, item in _items(path):
        label = item.get("label")
        if (kind := _kind(label)) is None:
            continue
        parts = label if isinstance(label, list) else [label]
        kinds.add(kind)
        lengths.add(len(parts))
        vector = vector and kind == "indices" and set(parts) <= {0, 1} and 1 in parts
        if len(kinds) > 1:
            raise DeloError(f"{path}, entry {number}: labels are written in several forms.", given=kinds)
    form = kinds.pop() if kinds else None
    if form == "indices" and vector and len(lengths) == 1 and lengths != {1}:
        return "vector"
    return form  # type: ignore[return-value]


def _kind(label: Any) -> str | None:
    """The form of a label by itself; None where it is not understood."""
    parts = label if isinstance(label, list) else [label]
    many = isinstance(label, list)
    if parts and all(type(part) is int and part >= 0 for part in parts):
        return "indices" if many else "index"
    if parts and all(isinstance(part, str) and part.strip() for part in parts):
        return "names" if many else "name"
    return None


def _items(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, item) of a file, as far as it can be read; what cannot is told by who reads the items."""
    with suppress(DeloError):
        for number, item in enumerate(each_entry(path)):
            if isinstance(item, dict):
                yield number, item


def _names(path: Path, form: LabelForm | None, classes: ClassTask) -> list[str]:
    """Class names in the order of their index: of the side file, else from the items themselves."""
    if classes.names is not None:
        return _names_in(classes.names)
    if form is None:
        return []
    if form == "index":
        return _names_from_images(path)
    raise DeloError(
        f"The labels in {path} are {form} and need the names of their classes.",
        fix="write a JSON list of the names, in the order of the class index, where `classes.names` of the "
        "recipe expects it",
    )


def _names_in(path: Path) -> list[str]:
    names = list(read_entries(path))
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise DeloError("A file of class names is a JSON list of different names.", given=path)
    return names


def _names_from_images(path: Path) -> list[str]:
    """Names by index, from each item's image: its folder, or its file name without the number at the end.

    Raises:
        DeloError: an index with several names, a name with several indices, or a gap.
    """
    found: dict[int, str] = {}
    for number, item in _items(path):
        label: Any = item.get("label")
        if _kind(label) is None:
            continue
        name = _class_of(str(item.get("image")))
        if found.setdefault(label, name) != name:
            raise DeloError(
                f"{path}, entry {number}: class {label} has several names.",
                given=f"{found[label]}, {name}",
                fix="write the names where `classes.names` of the recipe expects them",
            )
    # Compared first: a single label of 10^12 would otherwise make a list of that length.
    names = [found[index] for index in sorted(found)]
    if sorted(found) != list(range(len(found))) or "" in names or len(set(names)) < len(names):
        raise DeloError(
            f"The images in {path} do not tell one name for every class index.",
            given=", ".join(names),
            fix="write the names where `classes.names` of the recipe expects them",
        )
    return names


def _class_of(image: str) -> str:
    """`apple_pie/12.jpg`, `apple_pie_12.jpg` and `train/apple_pie_12.jpg` are of the class "apple pie"."""
    path = PurePosixPath(image)
    folder = path.parent.name
    name = folder if folder not in ("", *SPLITS) else re.sub(r"[_-]?\d+$", "", path.stem)
    return name.replace("_", " ")


def _part(item: Mapping[str, Any]) -> str:
    """Whose item it is.

    Raises:
        BadEntry: `task_id` or `split` does not say it.
    """
    task, split = item.get("task_id"), item.get("split")
    if type(task) is not int or task < 0:
        told = "`task_id` is a whole number from 0."
        raise BadEntry("entry_malformed", told, given=short(task))
    if split not in SPLITS:
        raise BadEntry("entry_malformed", "there is no such split.", given=short(split), allowed=SPLITS)
    return f"{task}/{split}"


def _require_fields(item: Mapping[str, Any]) -> None:
    """An item has its five fields."""
    lacks = [key for key in FIELDS if key not in item]
    if lacks:
        raise BadEntry("entry_malformed", f"it lacks {', '.join(lacks)}.", given=", ".join(item))


def _indices(label: Any, form: LabelForm, names: list[str]) -> list[int]:
    """The classes of an item as indices, in ascending order."""
    parts = label if isinstance(label, list) else [label]
    if form == "vector":
        parts = [index for index, flag in enumerate(parts) if flag]
    if form in ("name", "names"):
        unknown = [name for name in parts if name not in names]
        if unknown:
            raise BadEntry("label_form", "there is no such class.", given=unknown[0], allowed=names)
        return sorted(names.index(name) for name in parts)
    outside = [index for index in parts if not 0 <= index < len(names)]
    if outside:
        allowed = [f"0-{len(names) - 1}"]
        raise BadEntry("label_form", "there is no such class index.", given=outside[0], allowed=allowed)
    return sorted(parts)


def _text(given: Any) -> str | None:
    """The item's text; a list is joined by ". ", as RebQ does."""
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        given = ". ".join(given)
    if given is not None and not isinstance(given, str):
        raise BadEntry("entry_malformed", "`text` must be text or a list of texts.", given=short(given))
    return (given or "").strip() or None
