"""What a recipe file may say: the schema of `data_recipes/*.yaml` and of users' own files."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field

from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.schema import Section, checked, merged, read_yaml
from delo_llava.tasks import NEW_TOKENS, SPLITS, Split

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


def _inside(path: str) -> str:
    """Refuse a path that is absolute or climbs out of the data root."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("must be relative to the data root and stay inside it")
    return path


def _as_list(given: object) -> object:
    """One value may be written without a list."""
    return [given] if isinstance(given, str) else given


def _as_template(given: object) -> object:
    """A template may be written as its folder or folders."""
    return {"folders": given} if isinstance(given, str | list) else given


RelativePath = Annotated[str, AfterValidator(_inside)]
#: Accepted names of one file or folder, the usual one first.
Names = Annotated[list[RelativePath], BeforeValidator(_as_list), Field(min_length=1)]
Words = Annotated[list[str], BeforeValidator(_as_list)]


class Template(Section):
    """A variant of the instructions.

    Attributes:
        folders: accepted names of its folder; they stand for `{template}` in paths.
        suffix: stands for `{suffix}` in paths, for variants that differ by file name.
    """

    folders: Names
    suffix: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$")


class SideEntry(Section):
    """A side file joined to a task's records; the fields after `required` are those of `tasks.SideFile`.

    Attributes:
        file: accepted names, relative to the data root.
        required: whether training is refused without it; an optional one that is missing is said.
        obtain: where it comes from.
    """

    name: str
    file: Names
    required: bool = False
    obtain: str = ""
    splits: list[Split] = Field(default=list(SPLITS), min_length=1)
    shape: Literal["list", "map", "keys"] = "list"
    at: str = ""
    key: Words = []
    by: str = "id"
    gather: bool = False
    context: str | None = None
    prefix: str = ""
    extra: dict[str, str] = {}


class ClassesEntry(Section):
    """For files in the CMML layout, where one file holds all tasks and splits; see `tasks.ClassTask`.

    Attributes:
        number: the task's `task_id`.
        names: accepted names of the JSON file with the class names; without it, images' folders tell them.
        names_required: whether the data is incomplete without that file.
    """

    number: int = Field(ge=0)
    per_task: int = Field(ge=1)
    instruction: str = Field(min_length=1)
    names: Annotated[list[RelativePath], BeforeValidator(_as_list)] = []
    names_required: bool = False


class TaskEntry(Section):
    """One task of a recipe; paths are relative to the data root.

    Attributes:
        name: also the name of its folders on disk.
        kind: what sort of question it asks, in a word or two.
        files: for each split the accepted names of its file.
        image_root: accepted names of the folder that `image` entries of the records are relative to.
        images: folders below `image_root` that must be there.
        split_roots: accepted names of the image folder of single splits that have one of their own.
        answers: the closed set of answers, where every question has the same one: what chance is.
        sides: side files joined to the records.
        classes: set for files in the CMML layout.
        train: settings of `train` that differ for this task.
        obtain: where the files come from, shown when they are missing.
        no_answer: told where a record has no answer: how the user gets it, for files published without.
    """

    name: Name
    kind: str
    files: dict[Split, Names]
    image_root: Names = ["."]
    images: list[RelativePath] = []
    split_roots: dict[Split, Names] = {}
    scorer: str = "exact_match"
    max_new_tokens: int = Field(default=NEW_TOKENS, ge=1)
    answers: list[str] = []
    sides: list[SideEntry] = []
    classes: ClassesEntry | None = None
    train: dict[str, Any] = {}
    obtain: str = ""
    no_answer: str = ""


class Recipe(Section):
    """A recipe file as written.

    Attributes:
        templates: variants of the instructions by name, the usual one first.
        plain: none of them is the usual one; without a template `{suffix}` is empty.
        general: tasks kept aside, which no stage trains; see `eval.general`.
        protocol: what the published protocol says that settings cannot hold (start weights, what is shared).
    """

    name: Name
    title: str = ""
    source: str = ""
    licence: str = ""
    protocol: str = ""
    builder: Literal["mini6", "mini8"] | None = None
    templates: dict[Name, Annotated[Template, BeforeValidator(_as_template)]] = {}
    plain: bool = False
    tasks: list[TaskEntry] = Field(min_length=1)
    general: list[TaskEntry] = []
    defaults: dict[str, Any] = {}

    @property
    def template(self) -> str | None:
        """The template that is used when none is named."""
        return None if self.plain else next(iter(self.templates), None)


def read_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe without looking for its data.

    A recipe may say `like: <another>`: what it leaves out is the other's, and its tasks may be names of the
    other's tasks, or changes to one (`{name: gqa, scorer: exact_match}`).

    Raises:
        DeloError: no such recipe, or a fault in the file.
    """
    path = _path(name_or_path)
    recipe = checked(Recipe, _expanded(read_yaml(path), path), where=f"the recipe {path.name}")
    for entry in recipe.tasks:
        _check_entry(entry, recipe, path, ("train", "test"))
    for entry in recipe.general:
        _check_entry(entry, recipe, path, ("test",))
    names = [entry.name for entry in (*recipe.tasks, *recipe.general)]
    if len(set(names)) < len(names):
        raise DeloError(f"Task names in {path.name} are not unique.", given=", ".join(names))
    return recipe


def _path(name_or_path: str) -> Path:
    """The file of a shipped recipe, or the one that is named by its path."""
    named = not name_or_path.endswith((".yaml", ".yml")) and "/" not in name_or_path
    return cast(Path, load_plugin("recipe", name_or_path)) if named else Path(name_or_path)


def _expanded(raw: dict[str, Any], path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's content with what `like` takes from another one filled in.

    Raises:
        DeloError: recipes that are like each other, or a task that the other one does not have.
    """
    if "like" not in raw:
        return raw
    if path.resolve() in seen:
        raise DeloError(f"The recipe {path.name} is like itself.", given=f"like: {raw['like']}")
    other = _path(str(raw["like"]))
    base = _expanded(read_yaml(other), other, (*seen, path.resolve()))
    known = {task["name"]: task for task in _listed(base, other) if isinstance(task, dict) and "name" in task}
    tasks = []
    for given in _listed({"tasks": list(known)} | raw, path):
        name = given if isinstance(given, str) else given.get("name")
        if isinstance(given, str) and name not in known:
            raise DeloError(f"The recipe {other.name} has no task {name!r}.", given=name, allowed=known)
        tasks.append(merged(known.get(name, {}), {} if isinstance(given, str) else given))
    own = {key: value for key, value in raw.items() if key != "like"}
    return merged(base, own) | {"tasks": tasks}


def _listed(raw: dict[str, Any], path: Path) -> list[Any]:
    """The tasks of a recipe as written: names or mappings."""
    tasks = raw.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, str | dict) for task in tasks):
        raise DeloError(f"`tasks` of {path.name} is a list of names or mappings.", given=repr(tasks)[:80])
    return tasks


def _check_entry(entry: TaskEntry, recipe: Recipe, path: Path, splits: Sequence[Split]) -> None:
    """A task can be trained, tested and scored, as far as it has to be."""
    where = f"Task {entry.name!r} in {path.name}"
    for split in splits:
        if split not in entry.files:
            raise DeloError(f"{where} names no {split} file.", given=", ".join(entry.files))
    if entry.scorer not in (scorers := plugin_names("scorer")):
        raise DeloError(f"{where}: no such scorer.", given=entry.scorer, allowed=scorers)
    folders = [entry.image_root, *entry.split_roots.values(), *entry.files.values()]
    places = [name for names in folders for name in names]
    if unknown := [split for split in entry.split_roots if split not in entry.files]:
        told = f"{where}: `split_roots` names a split without a file."
        raise DeloError(told, given=unknown[0], allowed=entry.files)
    bare = recipe.plain or not recipe.templates
    if bare and (used := [place for place in places if "{template}" in place]):
        raise DeloError(f"{where} uses a template, but there are none.", given=used[0], fix="add `templates`")
    taken = [*SPLITS, "classes"]
    for side in entry.sides:
        if side.name in taken:
            raise DeloError(f"{where}: names of side files differ, and are no split's.", given=side.name)
        taken.append(side.name)
        if side.shape == "list" and not side.key:
            raise DeloError(f"{where}: the side file {side.name!r} needs a `key`.", fix="name a row's field")
        if side.context is None and not side.extra:
            raise DeloError(f"{where}: nothing is taken from the side file {side.name!r}.")
