"""Task sequences declared in YAML: which files make a task, where they belong, what to do without them."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Protocol, cast

from pydantic import AfterValidator, BeforeValidator, Field

from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.schema import Section, checked, read_yaml
from delo_llava.tasks import SPLITS, Split, TaskSequence, TaskSpec

#: Environment variable with the data root, for recipes whose data the user provides.
DATA_ENV = "DELO_LLAVA_DATA"

#: Functions that make a recipe's data from installed packages: `builder` key -> (module, function).
BUILDERS: dict[str, tuple[str, str]] = {
    "mini6": ("delo_llava.mini.build", "ensure_mini6"),
    "mini8": ("delo_llava.mini.build", "ensure_mini8"),
}


def _inside(path: str) -> str:
    """Refuse a path that is absolute or climbs out of the data root."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("must be relative to the data root and stay inside it")
    return path


def _as_list(given: object) -> object:
    """One path may be written without a list."""
    return [given] if isinstance(given, str) else given


RelativePath = Annotated[str, AfterValidator(_inside)]
#: Accepted names of one file, the usual one first.
Names = Annotated[list[RelativePath], BeforeValidator(_as_list), Field(min_length=1)]


class TaskEntry(Section):
    """One task of a recipe; paths are relative to the data root.

    Attributes:
        name: also the name of its folders on disk.
        kind: what sort of question it asks, in a word or two.
        files: for each split the accepted names of its JSON file.
        image_root: the folder that `image` entries of the records are relative to.
        images: folders below `image_root` that must be there.
        obtain: where the files come from, shown when they are missing.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    kind: str
    files: dict[Split, Names]
    image_root: RelativePath = "."
    images: list[RelativePath] = []
    scorer: str = "exact_match"
    max_new_tokens: int = Field(default=8, ge=1)
    obtain: str = ""


class Recipe(Section):
    """A recipe file as written."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str = ""
    source: str = ""
    licence: str = ""
    builder: Literal["mini6", "mini8"] | None = None
    tasks: list[TaskEntry] = Field(min_length=1)
    defaults: dict[str, Any] = {}


class _Builder(Protocol):
    """A function that returns the data root, building the data when it is not there yet."""

    def __call__(self, root: Path | None = None) -> Path: ...


def load_sequence(name_or_path: str, root: Path | None = None) -> TaskSequence:
    """The task sequence of a shipped recipe or a recipe file, with every file located.

    Args:
        name_or_path: name of a recipe (`delo-llava list recipes`) or a path ending in .yaml.
        root: the data root; by default $DELO_LLAVA_DATA, else `data/<name>`, or the builder's own place.

    Raises:
        DeloError: no such recipe, a fault in it, or missing data: each file, where it belongs, how to get it.
    """
    recipe = read_recipe(name_or_path)
    folder = _build(recipe.builder, root) if recipe.builder else data_root(recipe.name, root)
    if absent := list(_absent(recipe, folder)):
        raise _missing_data(recipe, folder, absent, name_or_path)
    tasks = tuple(_task(entry, folder) for entry in recipe.tasks)
    return TaskSequence(recipe.name, tasks, recipe.title, recipe.source, recipe.licence, recipe.defaults)


def recipe_defaults(name_or_path: str) -> dict[str, Any]:
    """The recipe's default configuration, nested; touches no data."""
    return read_recipe(name_or_path).defaults


def read_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe without looking for its data.

    Raises:
        DeloError: no such recipe, or a fault in the file.
    """
    named = not name_or_path.endswith((".yaml", ".yml")) and "/" not in name_or_path
    path = cast(Path, load_plugin("recipe", name_or_path)) if named else Path(name_or_path)
    recipe = checked(Recipe, read_yaml(path), where=f"the recipe {path.name}")
    for entry in recipe.tasks:
        _check_entry(entry, path)
    names = [entry.name for entry in recipe.tasks]
    if len(set(names)) < len(names):
        raise DeloError(f"Task names in {path.name} are not unique.", given=", ".join(names))
    return recipe


def data_root(name: str, root: Path | None) -> Path:
    """Where a sequence's data is: `root`, else $DELO_LLAVA_DATA, else `data/<name>` in this directory."""
    from_env = os.environ.get(DATA_ENV)
    return Path(root or from_env or Path("data") / name).expanduser().absolute()


def _build(builder: str, root: Path | None) -> Path:
    """Run a builder; the data root it returns is complete."""
    module, function = BUILDERS[builder]
    ensure = cast(_Builder, getattr(importlib.import_module(module), function))
    return ensure(root)


def _check_entry(entry: TaskEntry, path: Path) -> None:
    """A task can be trained, tested and scored."""
    for split in ("train", "test"):
        if split not in entry.files:
            raise DeloError(
                f"Task {entry.name!r} in {path.name} names no {split} file.", given=", ".join(entry.files)
            )
    if entry.scorer not in (scorers := plugin_names("scorer")):
        raise DeloError(
            f"Task {entry.name!r} in {path.name}: no such scorer.", given=entry.scorer, allowed=scorers
        )


def _first(folder: Path, names: list[str]) -> Path | None:
    """The first of several accepted file names that exists."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _absent(recipe: Recipe, folder: Path) -> Iterator[tuple[TaskEntry, str]]:
    """Every file or image folder that is not there, with its task."""
    for entry in recipe.tasks:
        for names in entry.files.values():
            if _first(folder, names) is None:
                yield entry, " or ".join(names)
        for images in entry.images or ["."]:
            if not (folder / entry.image_root / images).is_dir():
                yield entry, str(PurePosixPath(entry.image_root) / images) + "/"


def _task(entry: TaskEntry, folder: Path) -> TaskSpec:
    """A task whose files are known to exist."""
    found = ((split, _first(folder, entry.files.get(split, []))) for split in SPLITS)
    files = {split: path for split, path in found if path is not None}
    image_root = Path(os.path.normpath(folder / entry.image_root))
    return TaskSpec(entry.name, entry.kind, files, image_root, entry.scorer, entry.max_new_tokens)


def _missing_data(recipe: Recipe, folder: Path, absent: list[tuple[TaskEntry, str]], name: str) -> DeloError:
    """One line for each thing that is missing, then where each task's data comes from."""
    lines = [f"Data of {recipe.name} is missing below {folder}:"]
    lines += [f"  {entry.name}: {what}" for entry, what in absent]
    sources = {entry.name: entry.obtain for entry, _ in absent if entry.obtain}
    lines += [f"  where to get {task}: {' '.join(obtain.split())}" for task, obtain in sources.items()]
    return DeloError(
        "\n".join(lines),
        fix=f"put it there, or name another folder with --data.root or ${DATA_ENV}; "
        f"then check it with `delo-llava data check {name} --root {folder}`",
    )
