"""Which source decides an answer, and hashes of it.

Imports are read from syntax trees, so nothing is imported. Names that are computed at run time are not
followed, so that the loading of plug-ins (`delo_llava.registry`) does not make each a part of every other.
"""

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import all_suffixes
from importlib.util import find_spec, resolve_name
from pathlib import Path

from delo_llava.errors import DeloError
from delo_llava.files import sha256_file
from delo_llava.registry import KINDS, plugin_folders

#: Packages of this project; others decide by their versions (`hashes.PACKAGES`).
OURS = frozenset(("delo_llava", "delo_eval"))


@cache
def package_hash(names: tuple[str, ...]) -> str:
    """One hash over all source of packages."""
    return _hash({name: path for package in names for name, path in _contents(package).items()})


@cache
def source_hash(modules: tuple[str, ...]) -> str:
    """One hash over modules and all that they import, see `sources`."""
    return _hash(sources(modules))


def plugins_hash() -> str:
    """One hash over all source in the folders of plug-ins."""
    folders = [root / kind.folder for root in plugin_folders() for kind in KINDS.values()]
    return _hash({str(file): file for folder in folders for file in folder.rglob("*.py")})


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """Dotted name -> file of every module that `modules` come to.

    These are they themselves (of a package: all it holds), the packages they lie in, and whatever they import
    of this project or of their own top-level packages, at once or later, directly or not.

    Raises:
        DeloError: one of `modules` has no file.
    """
    started: dict[str, Path] = {}
    for module in modules:
        started |= _contents(module)
    own = OURS | {module.partition(".")[0] for module in modules}
    found: dict[str, Path] = {}
    left = list(started)
    while left:
        name = left.pop()
        path = _file(name) if name not in found and name.partition(".")[0] in own else None
        if path is not None:  # else known, another project's, or what a module defines
            found[name] = path
            left += [name.rpartition(".")[0], *_imported(name, path)]
    return found


def plugin_module(kind: str, module: str) -> str:
    """The plug-in that a module belongs to: a folder beside the other plug-ins counts as a whole."""
    place = KINDS[kind].package + "."
    return place + module.removeprefix(place).partition(".")[0] if module.startswith(place) else module


def _contents(name: str) -> dict[str, Path]:
    """A module, or a package with all it holds.

    Raises:
        DeloError: it has no file.
    """
    path = _file(name)
    if path is None:
        raise DeloError(
            "The source of a module that answers depend on is not found.",
            given=name,
            fix="install it as files, from which Python can import it",
        )
    if path.name != "__init__.py":
        return {name: path}
    found = {}
    for file in path.parent.rglob("*.py"):
        parts = file.relative_to(path.parent).with_suffix("").parts
        found[".".join((name, *(part for part in parts if part != "__init__")))] = file
    return found


def _file(name: str) -> Path | None:
    """The file of a module, in its top-level package or a folder of plug-ins; None where there is none."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top) if top else None
    except ValueError:  # a script
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        return Path(spec.origin) if spec.origin is not None and not rest else None
    places = [Path(folder, *rest) for folder in spec.submodule_search_locations]
    for place in [*places, *_plugin_places(name)]:
        files = (place / "__init__.py", *(place.with_name(place.name + end) for end in all_suffixes()))
        for file in files if rest else files[:1]:
            if file.is_file():
                return file
    return None


def _plugin_places(name: str) -> Iterator[Path]:
    """Where a plug-in of this name, or a module in it, would lie in the folders of plug-ins.

    Those that were in use when the package was loaded are on its path, whatever the environment says now.
    """
    for kind in KINDS.values():
        if name.startswith(f"{kind.package}."):
            parts = name.removeprefix(f"{kind.package}.").split(".")
            loaded = getattr(sys.modules.get(kind.package), "__path__", [])
            folders = [*loaded, *(root / kind.folder for root in plugin_folders())]
            yield from (Path(folder, *parts) for folder in folders)


def _imported(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, those for type checkers only left out."""
    if path.suffix != ".py":
        return
    tree = ast.parse(path.read_bytes())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            start = resolve_name(dots + (node.module or ""), package) if dots else str(node.module)
            yield start
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def _hash(files: dict[str, Path]) -> str:
    lines = (f"{name} {sha256_file(path)}" for name, path in sorted(files.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
