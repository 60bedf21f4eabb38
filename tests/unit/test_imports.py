"""Imports go one way, heavy libraries have one place each, and the library never imports the harness."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import delo_llava

ROOT = Path(delo_llava.__file__).parent

#: The rooms of the library from the ground up; each may import only what stands before it.
ORDER = (
    "errors", "cache", "extras", "strict", "files", "tasks", "registry", "schema", "data", "config", "keys",
    "backbones", "features", "adapters", "methods", "engines", "training", "runs", "cluster", "mini",
    "data_tools", "endings", "commands", "cli", "api", "__main__",
)  # fmt: skip

#: The application: these alone may know the harness.
APPLICATION = ("commands", "cli", "api", "__main__")

#: Rooms that must stay usable without most of what is below them.
ONLY = {
    "files": {"errors", "strict"},
    "data": {"errors", "cache", "strict", "tasks", "registry", "schema"},
    "features": {"errors", "strict", "data"},
    "adapters": {"errors", "strict", "data", "features"},
    "mini": {"errors", "cache", "extras", "tasks"},
}

#: Libraries and the one place where each may be imported, relative to the package.
ONE_PLACE = {
    "deepspeed": {"engines/group.py"},
    "bitsandbytes": {"backbones/_quant.py"},
    "flwr": set(),
}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names a module imports anywhere in it, by name too; those for type checkers only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))


def own(path: Path) -> set[str]:
    """Rooms of this library that a module imports."""
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "delo_llava" and name[1] in ORDER}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        assert own(path) <= {"registry"}, "the package itself imports nothing heavy of its own"
        return
    assert here in ORDER, f"put {here} into its place in ORDER"
    below = {*ORDER[: ORDER.index(here)], here}
    assert own(path) <= below, f"{here} imports what is above it"
    if here in ONLY:
        assert own(path) <= ONLY[here] | {here}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_never_imports_the_harness(path: Path) -> None:
    assert room(path) in APPLICATION or not [
        name for name in imports(path) if name.split(".")[0] == "delo_eval"
    ]


@pytest.mark.parametrize("library", ONE_PLACE)
def test_heavy_libraries_are_imported_in_one_place(library: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert found <= ONE_PLACE[library]


def test_the_plotting_library_is_the_harness_s_alone() -> None:
    assert not [
        path for path in modules() if any(name.split(".")[0] == "matplotlib" for name in imports(path))
    ]


def test_features_and_adapters_need_few_libraries() -> None:
    known = {"torch", "peft", "transformers", "safetensors", "numpy", "delo_llava", *sys.stdlib_module_names}
    for path in [path for path in modules() if room(path) in ("features", "adapters")]:
        outside = {name.split(".")[0] for name in imports(path)} - known
        assert not outside, f"{path} imports {outside}"


def test_every_package_is_shipped() -> None:
    """A package folder that pyproject.toml does not list would be missing from the wheel."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    found = set()
    for name, folder in project["package-dir"].items():
        inits = (ROOT.parent / folder).rglob("__init__.py")
        parts = (init.parent.relative_to(ROOT.parent / folder).parts for init in inits)
        found |= {".".join((name, *rest)) for rest in parts}
    assert found == set(project["packages"])
