"""Task sequences declared in YAML: which files make a task, where they belong, what to do without them."""

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

from delo_llava.data.recipe_file import Recipe, SideEntry, TaskEntry, Template, read_recipe
from delo_llava.errors import DeloError
from delo_llava.schema import merged
from delo_llava.tasks import SPLITS, ClassTask, SideFile, Split, TaskSequence, TaskSpec

__all__ = [
    "DATA_ENV",
    "data_root",
    "load_general",
    "load_sequence",
    "load_task",
    "read_recipe",
    "recipe_defaults",
]

#: Environment variable with the data root, for recipes whose data the user provides.
DATA_ENV = "DELO_LLAVA_DATA"

#: Functions that make a recipe's data from installed packages: `builder` key -> (module, function).
BUILDERS: dict[str, tuple[str, str]] = {
    "mini6": ("delo_llava.mini.build", "ensure_mini6"),
    "mini8": ("delo_llava.mini.build", "ensure_mini8"),
}
#: (builder, template) -> a function that makes the template's files, for those with files of their own.
TEMPLATE_BUILDERS: dict[tuple[str, str], tuple[str, str]] = {
    ("mini6", "neutral"): ("delo_llava.mini.build", "ensure_neutral_mini6"),
    ("mini8", "neutral"): ("delo_llava.mini.build", "ensure_neutral_mini8"),
}
#: The same for tasks kept aside, which lie in a folder of their own.
ASIDE_BUILDER = ("delo_llava.mini.build", "ensure_aside")


class _Builder(Protocol):
    """A function that returns the data root, building the data when it is not there yet."""

    def __call__(self, root: Path | None = None) -> Path: ...


def load_sequence(name_or_path: str, root: Path | None = None, template: str | None = None) -> TaskSequence:
    """The task sequence of a shipped recipe or a recipe file, with every file located.

    Args:
        name_or_path: name of a recipe (`delo-llava list recipes`) or a path ending in .yaml.
        root: the data root; by default $DELO_LLAVA_DATA, else `data/<name>`, or the builder's own place.
        template: variant of the instructions; by default the recipe's first.

    Raises:
        DeloError: no such recipe or template, a fault in it, or missing data: each file, where it belongs,
            how to get it.
    """
    recipe = read_recipe(name_or_path)
    chosen = _template(recipe, template)
    place = _place(recipe, root, chosen)
    if absent := list(_absent(recipe.tasks, place)):
        raise _missing_data(recipe, place.folder, absent, name_or_path)
    tasks = tuple(_task(entry, place) for entry in recipe.tasks)
    about = (recipe.title, recipe.source, recipe.licence)
    return TaskSequence(recipe.name, tasks, *about, defaults=recipe.defaults, template=chosen)


def load_general(name_or_path: str, root: Path | None = None, template: str | None = None) -> list[TaskSpec]:
    """The tasks that a recipe keeps aside, with every file located.

    Args:
        name_or_path, root, template: as for `load_sequence`.

    Raises:
        DeloError: the recipe keeps none aside, or their data is missing.
    """
    recipe = read_recipe(name_or_path)
    if not recipe.general:
        raise DeloError(
            f"The recipe {recipe.name} keeps no task aside, so no general ability can be measured.",
            given="eval.general=true",
            fix="leave eval.general out, or list such tasks under `general` of a recipe file (docs/data.md)",
        )
    if recipe.builder:
        place = _Place(_built(ASIDE_BUILDER, root), None)
    else:
        place = _place(recipe, root, _template(recipe, template))
    if absent := list(_absent(recipe.general, place)):
        raise _missing_data(recipe, place.folder, absent, name_or_path)
    return [_task(entry, place) for entry in recipe.general]


def load_task(name_or_path: str, task: str, split: Split, root: Path | None = None) -> TaskSpec:
    """One task of a recipe for reading one split's questions and answers: nothing else has to be there.

    Args:
        name_or_path, root: as for `load_sequence`.

    Raises:
        DeloError: no such recipe, task or split, a fault in the recipe, or missing files of this split.
    """
    recipe = read_recipe(name_or_path)
    known = {entry.name: entry for entry in recipe.tasks}
    if task not in known:
        raise DeloError(f"The recipe {recipe.name} has no such task.", given=task, allowed=known)
    if split not in known[task].files:
        raise DeloError(f"Task {task!r} has no {split} file.", given=split, allowed=known[task].files)
    place = _place(recipe, root, recipe.template)
    entry = _of_split(known[task], split)
    if absent := list(_absent_files(entry, place)):
        raise _missing_data(recipe, place.folder, absent, name_or_path)
    return _task(entry, place)


def _of_split(entry: TaskEntry, split: Split) -> TaskEntry:
    """A task with the files of one split alone."""
    sides = [side for side in entry.sides if split in side.splits]
    roots = {key: names for key, names in entry.split_roots.items() if key == split}
    changed = {"files": {split: entry.files[split]}, "sides": sides, "split_roots": roots}
    return entry.model_copy(update=changed)


def recipe_defaults(name_or_path: str) -> dict[str, Any]:
    """The recipe's default configuration, nested, with its template and what single tasks train with.

    Touches no data.
    """
    recipe = read_recipe(name_or_path)
    ours: dict[str, Any] = {"data": {"template": recipe.template}} if recipe.template else {}
    tasks = {entry.name: entry.train for entry in recipe.tasks if entry.train}
    return merged(merged(ours, {"per_task": tasks} if tasks else {}), recipe.defaults)


def located_root(name_or_path: str, root: Path | None) -> Path | None:
    """The data root to note in a run: None for a sequence that is built where its cache is."""
    recipe = read_recipe(name_or_path)
    return root and root.absolute() if recipe.builder else data_root(recipe.name, root)


def data_root(name: str, root: Path | None) -> Path:
    """Where a sequence's data is: `root`, else $DELO_LLAVA_DATA, else `data/<name>` in this directory."""
    from_env = os.environ.get(DATA_ENV)
    return Path(root or from_env or Path("data") / name).expanduser().absolute()


class _Place:
    """The data root seen through a template: finds the first of several accepted names."""

    def __init__(self, folder: Path, template: Template | None) -> None:
        self.folder, self.template = folder, template

    def names(self, names: Sequence[str]) -> list[str]:
        """Accepted names with the template's folders and suffix filled in."""
        if self.template is None:
            return [name.replace("{suffix}", "") for name in names]
        template = self.template
        filled = (
            name.replace("{template}", folder).replace("{suffix}", template.suffix)
            for name in names
            for folder in (template.folders if "{template}" in name else [""])
        )
        return list(dict.fromkeys(str(PurePosixPath(name)) for name in filled))

    def file(self, names: Sequence[str]) -> Path | None:
        """The first that is a file."""
        found = (self.folder / name for name in self.names(names))
        return next((path for path in found if path.is_file()), None)

    def image_root(self, entry: TaskEntry) -> Path | None:
        """The first accepted folder that exists and has all folders of pictures in it."""
        found = (self.folder / name for name in self.names(entry.image_root))
        wanted = entry.images or ["."]
        return next((path for path in found if all((path / images).is_dir() for images in wanted)), None)

    def split_root(self, entry: TaskEntry, split: Split) -> Path | None:
        """The first accepted image folder of a split with one of its own."""
        found = (self.folder / name for name in self.names(entry.split_roots[split]))
        return next((path for path in found if path.is_dir()), None)


def _template(recipe: Recipe, given: str | None) -> str | None:
    """The name of the template to use.

    Raises:
        DeloError: one that the recipe does not have.
    """
    if given is None:
        return recipe.template
    if given not in recipe.templates:
        raise DeloError(
            f"The recipe {recipe.name} has no template {given!r}.",
            given=given,
            allowed=recipe.templates,
        )
    return given


def _place(recipe: Recipe, root: Path | None, template: str | None) -> _Place:
    """Where the recipe's data is, built where the recipe has a builder."""
    if recipe.builder is None:
        folder = data_root(recipe.name, root)
    else:
        own = TEMPLATE_BUILDERS.get((recipe.builder, template or ""))
        folder = _built(own or BUILDERS[recipe.builder], root)
    return _Place(folder, recipe.templates[template] if template else None)


def _built(builder: tuple[str, str], root: Path | None) -> Path:
    """Run a builder; the data root it returns is complete."""
    module, function = builder
    ensure = cast(_Builder, getattr(importlib.import_module(module), function))
    return ensure(root)


def _absent(entries: Sequence[TaskEntry], place: _Place) -> Iterator[tuple[TaskEntry, str, str]]:
    """Every required file or image folder that is not there: its task, what it is, where to get it."""
    for entry in entries:
        yield from _absent_files(entry, place)
        if place.image_root(entry) is None:
            for images in _absent_images(entry, place):
                yield entry, images, entry.obtain
        for split, names in entry.split_roots.items():
            if place.split_root(entry, split) is None:
                yield entry, " or ".join(f"{name}/" for name in place.names(names)), entry.obtain


def _absent_files(entry: TaskEntry, place: _Place) -> Iterator[tuple[TaskEntry, str, str]]:
    """Every required file of a task that is not there, as `_absent`."""
    for names in entry.files.values():
        if place.file(names) is None:
            yield entry, " or ".join(place.names(names)), entry.obtain
    for side in entry.sides:
        if side.required and place.file(side.file) is None:
            yield entry, " or ".join(place.names(side.file)), side.obtain or entry.obtain
    classes = entry.classes
    if classes is not None and classes.names_required and place.file(classes.names) is None:
        yield entry, " or ".join(classes.names), entry.obtain


def _absent_images(entry: TaskEntry, place: _Place) -> Iterator[str]:
    """Folders of pictures that no accepted image root has, or that no single one has together."""
    roots, wanted = place.names(entry.image_root), entry.images or ["."]
    lacking = [
        images for images in wanted if not any((place.folder / root / images).is_dir() for root in roots)
    ]
    for images in lacking:
        yield " or ".join(f"{PurePosixPath(root) / images}/" for root in roots)
    if not lacking:
        yield f"{', '.join(wanted)} in one of the folders {', '.join(roots)}"


def _task(entry: TaskEntry, place: _Place) -> TaskSpec:
    """A task whose files are known to exist; without its pictures it can be read, not trained."""
    found = ((split, place.file(entry.files.get(split, []))) for split in SPLITS)
    files = {split: path for split, path in found if path is not None}
    usual = place.folder / place.names(entry.image_root)[0]
    image_root = Path(os.path.normpath(place.image_root(entry) or usual))
    split_roots = {
        split: Path(os.path.normpath(place.split_root(entry, split) or place.folder / place.names(names)[0]))
        for split, names in entry.split_roots.items()
    }
    sides = [(side, place.file(side.file)) for side in entry.sides]
    classes = entry.classes
    return TaskSpec(
        name=entry.name,
        kind=entry.kind,
        files=files,
        image_root=image_root,
        scorer=entry.scorer,
        max_new_tokens=entry.max_new_tokens,
        answers=tuple(entry.answers),
        sides=tuple(_side(side, path) for side, path in sides if path is not None),
        classes=None
        if classes is None
        else ClassTask(classes.number, classes.per_task, classes.instruction, place.file(classes.names)),
        absent=tuple(_absent_side(side, place) for side, path in sides if path is None),
        split_roots=split_roots,
        no_answer=" ".join(entry.no_answer.split()),
    )


def _side(side: SideEntry, path: Path) -> SideFile:
    """A side file that exists."""
    return SideFile(
        name=side.name,
        path=path,
        splits=tuple(side.splits),
        shape=side.shape,
        at=side.at,
        key=tuple(side.key),
        by=side.by,
        gather=side.gather,
        context=side.context,
        prefix=side.prefix,
        extra=side.extra,
    )


def _absent_side(side: SideEntry, place: _Place) -> str:
    """What is said of an optional side file that is not there."""
    what = ("context " if side.context else "") + ", ".join(f"extra[{key!r}]" for key in side.extra)
    return f"{side.name} ({' or '.join(place.names(side.file))}): without it records lack {what.strip()}"


def _missing_data(
    recipe: Recipe, folder: Path, absent: Sequence[tuple[TaskEntry, str, str]], name: str
) -> DeloError:
    """One line for each thing that is missing, then where each task's data comes from."""
    lines = [f"Data of {recipe.name} is missing below {folder}:"]
    lines += [f"  {entry.name}: {what}" for entry, what, _ in absent]
    sources = dict.fromkeys((entry.name, " ".join(obtain.split())) for entry, _, obtain in absent if obtain)
    lines += [f"  where to get {task}: {obtain}" for task, obtain in sources]
    return DeloError(
        "\n".join(lines),
        fix=f"put it there, or name another folder with --data.root or ${DATA_ENV}; "
        f"then check it with `delo-llava data check {name} --root {folder}`",
    )
