"""Plug-ins by file name: a method, scorer, recipe … is one new file, found without importing the others.

A file counts wherever it lies: in its package, in a folder of that kind below one that $DELO_LLAVA_PLUGINS
names (`methods/`, `backbones/`, `recipes/` …), or behind an entry point `delo_llava.<kind>` of an installed
package.
"""

import ast
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from delo_llava.errors import DeloError


@dataclass(frozen=True)
class PluginKind:
    """Where one kind of plug-in lives: modules that define `attribute`, or data files when it is None.

    Attributes:
        folder: its name below a folder of plug-ins.
    """

    package: str
    folder: str
    suffix: str = ".py"
    attribute: str | None = None


KINDS: dict[str, PluginKind] = {
    "method": PluginKind("delo_llava.methods", "methods", attribute="METHOD"),
    "backbone": PluginKind("delo_llava.backbones", "backbones", attribute="BACKBONE"),
    "scorer": PluginKind("delo_eval.scorers", "scorers", attribute="SCORER"),
    "metric": PluginKind("delo_eval.metrics", "metrics", attribute="METRIC"),
    "command": PluginKind("delo_llava.commands", "commands", attribute="COMMAND"),
    "eval_command": PluginKind("delo_eval.commands", "eval_commands", attribute="COMMAND"),
    "recipe": PluginKind("delo_recipes", "recipes", suffix=".yaml"),
    "published": PluginKind("delo_eval.published", "published", suffix=".yaml"),
    "zero": PluginKind("delo_ds_configs", "zero", suffix=".json"),
}

#: Environment variable with folders of plug-ins, separated as in PATH.
PLUGINS_ENV = "DELO_LLAVA_PLUGINS"


def plugin_names(kind: str) -> list[str]:
    """Names of every plug-in of `kind`, shipped or declared by a third party, sorted; nothing is imported.

    Args:
        kind: a key of `KINDS`.

    Raises:
        DeloError: unknown kind.
    """
    return sorted({*_files(_kind(kind)), *_entry_points(kind)})


def load_plugin(kind: str, name: str) -> object:
    """The object (or, for data kinds, the `Path`) registered under `name`; imports that one module only.

    Raises:
        DeloError: unknown kind or name, a name that two plug-ins have, or one that cannot be imported or
            lacks its attribute.
    """
    place = _kind(kind)
    path, declared = _files(place).get(name), _entry_points(kind)
    if path is not None and name in declared:
        raise _two_of_one_name(f"{path} and the entry point {declared[name].value}")
    if path is not None:
        return path if place.attribute is None else _attribute(kind, name, place)
    if name in declared:
        return _load_entry_point(kind, declared[name], as_path=place.attribute is None)
    raise DeloError(
        f"There is no {kind} called {name!r}.",
        given=name,
        allowed=plugin_names(kind),
        fix=f"`delo-llava list {kind}s` shows what is installed",
    )


def plugin_summary(kind: str, name: str) -> str:
    """One line about a shipped plug-in, read from its file without importing it; empty when it has none."""
    path = _files(_kind(kind)).get(name)
    if path is None or path.suffix == ".json":
        return ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return _docstring(text).partition("\n")[0]
    title = re.search(r"^title: *(.+)$", text, re.MULTILINE)
    return title[1].strip("\"' ") if title else ""


def plugin_limits(kind: str, name: str) -> str:
    """What a plug-in in Python cannot do: the paragraph of its file's docstring that begins with `Limits:`,
    in one line without that word; empty when it tells none.
    """
    path = _files(_kind(kind)).get(name)
    if path is None or path.suffix != ".py":
        return ""
    paragraphs = _docstring(path.read_text(encoding="utf-8")).split("\n\n")
    found = next((text for text in paragraphs if text.startswith("Limits:")), "")
    return " ".join(found.split()).removeprefix("Limits: ")


def _docstring(source: str) -> str:
    return ast.get_docstring(ast.parse(source)) or ""


def _kind(kind: str) -> PluginKind:
    """The place of `kind`, or an error with the known kinds."""
    if kind not in KINDS:
        raise DeloError("Unknown kind of plug-in.", given=kind, allowed=KINDS)
    return KINDS[kind]


def _files(place: PluginKind) -> dict[str, Path]:
    """Plug-ins of a package by name: files, or folders with an `__init__.py`, which is what is given then.

    Helpers, no plug-ins: a leading underscore, or the name `base`.
    """
    try:
        spec = importlib.util.find_spec(place.package)
    except ModuleNotFoundError:
        return {}
    shipped = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    found: dict[str, Path] = {}
    for folder in [*map(Path, shipped), *(root / place.folder for root in plugin_folders())]:
        for name, path in _in_folder(folder, place.suffix):
            if found.setdefault(name, path) != path:
                raise _two_of_one_name(f"{path} and {found[name]}")
    return found


def _two_of_one_name(given: str) -> DeloError:
    return DeloError("Two plug-ins have one name.", given=given, fix="rename your own")


def _in_folder(folder: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    named = [(path.stem, path) for path in folder.glob(f"*{suffix}")]
    if suffix == ".py":
        named += [(path.parent.name, path) for path in folder.glob("*/__init__.py")]
    return ((name, path) for name, path in named if not name.startswith("_") and name != "base")


def plugin_folders() -> list[Path]:
    """The folders of plug-ins that $DELO_LLAVA_PLUGINS names.

    Raises:
        DeloError: one of them is no folder.
    """
    folders = [Path(name).expanduser() for name in os.environ.get(PLUGINS_ENV, "").split(os.pathsep) if name]
    for folder in folders:
        if not folder.is_dir():
            raise DeloError(f"${PLUGINS_ENV} names a folder that is not there", given=folder)
    return folders


@cache
def _entry_points(kind: str) -> dict[str, EntryPoint]:
    """Third-party plug-ins declared under the entry-point group `delo_llava.<kind>`."""
    return {point.name: point for point in entry_points(group=f"delo_llava.{kind}")}


def _attribute(kind: str, name: str, place: PluginKind) -> object:
    """Import a shipped plug-in's module and take its declared attribute."""
    try:
        _extend(place)
        module = importlib.import_module(f"{place.package}.{name}")
    except ImportError as error:
        raise DeloError(
            f"The {kind} {name!r} cannot be imported: {error}", fix="install what it needs"
        ) from error
    found: object = getattr(module, place.attribute or "", None)
    if found is None:
        raise DeloError(f"The {kind} {name!r} defines no {place.attribute} in {module.__file__}.")
    return found


def load_unfollowed(module: str) -> object:
    """A module of this project by its name, which no reader of imports follows: what is loaded so decides
    no answer (`delo_eval.answers.code`)."""
    return importlib.import_module(module)


def _extend(place: PluginKind) -> None:
    """Let Python find modules of a package in the folders of plug-ins, too."""
    package = importlib.import_module(place.package)
    for root in plugin_folders():
        if str(root / place.folder) not in package.__path__:
            package.__path__.append(str(root / place.folder))


def _load_entry_point(kind: str, point: EntryPoint, as_path: bool) -> object:
    """Load a third party's object; data kinds may declare a path or a string."""
    try:
        found: object = point.load()
    except (ImportError, AttributeError) as error:
        raise DeloError(f"The {kind} {point.name!r} ({point.value}) cannot be imported: {error}") from error
    return Path(str(found)) if as_path else found
