"""Rows from the CMML layout (RebQ, DeLo): one JSON array with the items of all tasks and splits.

Items are `{"task_id", "split", "image", "text", "label"}`. The label is a class index, a list of class
indices, a 0/1 vector over all classes, or class names; which one it is is decided over the whole file and
told in `extra["label_form"]`. Generated answers are the class name, or several in alphabetical order joined
by commas. As in RebQ's trainer, task k (from 0) knows the classes below `per_task`·(k+1): labels of later
tasks are left out of its answers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from delo_llava.data.embedded import EmbeddedImages
from delo_llava.data.entries import read_entries
from delo_llava.data.rows import Row, image_of
from delo_llava.errors import DeloError
from delo_llava.tasks import SPLITS, ClassTask, Split, TaskSpec

LabelForm = Literal["index", "indices", "vector", "name", "names"]


def part_of(classes: ClassTask, split: Split) -> str:
    """What `part` is in the rows of one task's split."""
    return f"{classes.number}/{split}"


def cmml_rows(task: TaskSpec, split: Split, images: EmbeddedImages) -> Iterator[Row]:
    """Flat rows of every task and split of a CMML file; the column `part` tells them apart.

    Ids are `<task_id>-<split>-<number of the item in the file>`.

    Raises:
        DeloError: a fault of an item (named), labels of different forms, names that do not fit the indices.
    """
    classes = task.classes
    if classes is None:
        raise DeloError(f"Task {task.name!r} does not say which classes it has.", fix="add `classes`")
    path = task.files[split]
    form = label_form(path)
    names = _names(path, form, classes)
    for number, item in enumerate(read_entries(path)):
        where = f"{path}, item {number}"
        _check(item, where)
        known = min(classes.per_task * (item["task_id"] + 1), len(names))
        labels = [index for index in _indices(item["label"], form, names, where) if index < known]
        if not labels:
            raise DeloError(
                f"{where}: none of its labels belongs to its task or an earlier one.",
                given=f"task_id {item['task_id']}, label {item['label']!r}",
                fix="check the order of the class names and `per_task` in the recipe",
            )
        chosen = sorted(names[index] for index in labels)
        extra = {"labels": chosen, "label_ids": labels, "label_form": form}
        if item["split"] != "train":
            extra["classes"] = names[:known]
        yield {
            "id": f"{item['task_id']}-{item['split']}-{number}",
            "image": image_of(item, task.image_root, images, where),
            "context": _text(item["text"], where),
            "instruction": classes.instruction,
            "answer": ", ".join(chosen),
            "extra": json.dumps(extra),
            "entry": number,
            "part": f"{item['task_id']}/{item['split']}",
        }


def label_form(path: Path) -> LabelForm:
    """How a file writes its labels, decided over all its items.

    A list is a vector when all lists have one length above one and hold only 0 and 1, each at least one 1,
    and indices otherwise.

    Raises:
        DeloError: labels of several kinds, or of none of the known ones.
    """
    kinds: set[str] = set()
    lengths: set[int] = set()
    vector = True
    for number, item in enumerate(read_entries(path)):
        label = item.get("label") if isinstance(item, dict) else None
        many = isinstance(label, list)
        parts = label if isinstance(label, list) else [label]
        kind = {type(part) for part in parts}
        if not parts or not (kind == {str} or kind == {int}):
            raise DeloError(f"{path}, item {number}: this label is not understood.", given=repr(label)[:80])
        kinds.add(("names" if many else "name") if kind == {str} else ("indices" if many else "index"))
        lengths.add(len(parts))
        vector = vector and many and set(parts) <= {0, 1} and 1 in parts
        if len(kinds) > 1:
            raise DeloError(f"{path}, item {number}: labels are written in several forms.", given=kinds)
    form = kinds.pop()
    if form == "indices" and vector and len(lengths) == 1 and lengths != {1}:
        return "vector"
    return form  # type: ignore[return-value]


def _names(path: Path, form: LabelForm, classes: ClassTask) -> list[str]:
    """Class names in the order of their index: of the side file, else from the items themselves."""
    if classes.names is not None:
        return _names_in(classes.names)
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
    for number, item in enumerate(read_entries(path)):
        _check(item, f"{path}, item {number}")
        name = _class_of(str(item["image"]))
        if found.setdefault(item["label"], name) != name:
            raise DeloError(
                f"{path}, item {number}: class {item['label']} has several names.",
                given=f"{found[item['label']]}, {name}",
                fix="write the names where `classes.names` of the recipe expects them",
            )
    names = [found.get(index, "") for index in range(max(found) + 1)]
    if "" in names or len(set(names)) < len(names):
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


def _check(item: Any, where: str) -> None:
    """An item has its five fields, of the right kinds."""
    if not isinstance(item, Mapping):
        raise DeloError(f"{where} is not an object.", given=repr(item)[:80])
    lacks = [key for key in ("task_id", "split", "image", "text", "label") if key not in item]
    if lacks:
        raise DeloError(f"{where} lacks {', '.join(lacks)}.", given=", ".join(item))
    if not isinstance(item["task_id"], int) or item["task_id"] < 0:
        raise DeloError(f"{where}: `task_id` is a whole number from 0.", given=item["task_id"])
    if item["split"] not in SPLITS:
        raise DeloError(f"{where}: no such split.", given=item["split"], allowed=SPLITS)


def _indices(label: Any, form: LabelForm, names: list[str], where: str) -> list[int]:
    """The classes of an item as indices, in ascending order."""
    parts = label if isinstance(label, list) else [label]
    if form == "vector":
        parts = [index for index, flag in enumerate(parts) if flag]
    if form in ("name", "names"):
        unknown = [name for name in parts if name not in names]
        if unknown:
            raise DeloError(f"{where}: no such class.", given=unknown[0], allowed=names)
        return sorted(names.index(name) for name in parts)
    outside = [index for index in parts if not 0 <= index < len(names)]
    if outside:
        raise DeloError(f"{where}: no such class index.", given=outside[0], allowed=[f"0-{len(names) - 1}"])
    return sorted(parts)


def _text(given: Any, where: str) -> str | None:
    """The item's text; a list is joined by ". ", as RebQ does."""
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        given = ". ".join(given)
    if given is not None and not isinstance(given, str):
        raise DeloError(f"{where}: `text` must be text or a list of texts.", given=repr(given)[:80])
    return (given or "").strip() or None
