"""Imports go one way, heavy libraries have one place each, and the library never imports the harness."""

import ast
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import delo_llava

ROOT = Path(delo_llava.__file__).parent

#: The parts of the library from the ground up; each may import only what stands before it.
ORDER = (
    "errors", "strict", "tasks", "registry", "schema", "mini", "data", "config", "routing", "experts",
    "losses", "checkpoint", "backbones", "gate", "data_tools", "methods", "training", "cluster", "commands",
    "cli",
)  # fmt: skip

#: Modules that pretrain the small bases and judge them: on top of data and backbones, below nothing.
GATE = {("mini", "adapt"), ("mini", "gate"), ("mini", "pretrain")}

#: Parts that must stay usable without most of what is below them.
ONLY = {
    "data": {"errors", "strict", "tasks", "registry", "schema"},
    "routing": {"errors", "strict"},
    "experts": {"errors", "strict", "routing"},
    "losses": {"errors"},
    "checkpoint": {"errors", "strict"},
    "mini": {"errors", "tasks"},
}

#: Libraries and the one place where each may be imported, relative to the package.
ONE_PLACE = {
    "deepspeed": {"training/engine.py"},
    "bitsandbytes": {"backbones/_quant.py"},
    "flwr": set(),
}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def part(path: Path) -> str:
    return named(path.relative_to(ROOT).with_suffix("").parts)


def named(parts: Sequence[str]) -> str:
    """The part of the library that a module, given below the package, belongs to."""
    return "gate" if tuple(parts[:2]) in GATE else parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names a module imports anywhere in it, those for type checkers only left out."""
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


def own(path: Path) -> set[str]:
    """Parts of this library that a module imports."""
    names = [name.split(".") for name in imports(path)]
    return {named(name[1:]) for name in names if name[0] == "delo_llava" and name[1] in ORDER}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        assert not own(path), "the package itself imports nothing of its own"
        return
    assert here in ORDER, f"put {here} into its place in ORDER"
    below = {*ORDER[: ORDER.index(here)], here}
    assert own(path) <= below, f"{here} imports what is above it"
    if here in ONLY:
        assert own(path) <= ONLY[here] | {here}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_never_imports_the_harness(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "delo_eval"]


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


def test_experts_and_routing_need_torch_and_peft_only() -> None:
    known = {"torch", "peft", "safetensors", "numpy", "delo_llava", *sys.stdlib_module_names}
    for path in [path for path in modules() if part(path) in ("experts", "routing")]:
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
