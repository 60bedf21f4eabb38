"""The harness's rooms import downwards only, strings given to `import_module` counted as imports."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_imports import ROOT as LIBRARY
from test_imports import imports

import delo_eval

ROOT = Path(delo_eval.__file__).parent

#: The rooms from the ground up; each may import only what stands before it.
ORDER = (
    "tables", "scorers", "metrics", "matrix", "answers", "published", "compare", "report", "harness",
    "commands", "cli", "__main__",
)  # fmt: skip

#: Rooms that must stay usable without most of what is below them.
ONLY: dict[str, set[str]] = {
    "tables": set(),
    "scorers": set(),
    "metrics": set(),
    "published": {"tables", "metrics"},
}

#: Rooms that read answer files and tables of anyone, and what of the library they may know.
PLAIN = {"scorers", "metrics", "published"}
GROUND = {"errors", "extras", "registry", "schema", "strict", "tasks"}

#: Libraries that are slow, large or optional, and the only modules that may import them.
ONE_PLACE = {
    "torch": {
        "harness/decoding_time.py",
        "harness/generate.py",
        "harness/lmms.py",
        "harness/model.py",
        "harness/ranks.py",
        "harness/stage.py",
        "harness/unchanged.py",
    },
    "transformers": {"harness/generate.py"},
    "matplotlib": {"matrix/plots.py"},
    "jinja2": {"report/render.py"},
    "lmms_eval": {"harness/lmms.py"},
    "pycocoevalcap": {"scorers/_captions.py"},
}

#: (module, name that it computes) -> the library that is imported so; any other computed name is an error.
COMPUTED = {("scorers/_captions.py", "f'pycocoevalcap.{module}'"): "pycocoevalcap"}

#: (module, string): the harness's modules that the library names in strings, as it may not import them.
NAMED_BY_THE_LIBRARY = {
    ("cli.py", "delo_eval.harness.run"),
    ("commands/ask.py", "delo_eval.harness.ask"),
    ("commands/ask.py", "delo_eval.tables"),
    ("commands/benchmark.py", "delo_eval.compare.benchmark"),
    ("commands/compare.py", "delo_eval.compare.assemble"),
    ("commands/compare.py", "delo_eval.compare.leaderboard"),
    ("commands/compare.py", "delo_eval.tables"),
    ("commands/compare.py", "delo_eval.report.compare"),
    ("commands/diff.py", "delo_eval.compare.diff"),
    ("commands/diff.py", "delo_eval.tables"),
    ("registry.py", "delo_eval.commands"),
    ("registry.py", "delo_eval.metrics"),
    ("registry.py", "delo_eval.published"),
    ("registry.py", "delo_eval.scorers"),
    ("commands/watch.py", "delo_eval.report.live"),
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def all_imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, by statement, string or computed name."""
    yield from imports(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
        if call and not isinstance(node.args[0], ast.Constant):
            yield COMPUTED[name_of(path), ast.unparse(node.args[0])]


def rooms(path: Path) -> set[str]:
    """Rooms that a module imports."""
    parts = [name.split(".") for name in all_imports(path)]
    return {part[1] for part in parts if part[0] == "delo_eval" and len(part) > 1}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_rooms_import_downwards_only(path: Path) -> None:
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    if here == "__init__":
        assert not list(all_imports(path)), "the package itself imports nothing"
        return
    assert here in ORDER, f"put {here} into its place in ORDER"
    below = {*ORDER[: ORDER.index(here)], here}
    assert rooms(path) <= below, f"{here} imports what is above it"
    if here in ONLY:
        assert rooms(path) <= ONLY[here] | {here}


@pytest.mark.parametrize("room", sorted(PLAIN))
def test_scorers_metrics_and_tables_know_only_the_ground_floor_of_the_library(room: str) -> None:
    parts = [name.split(".") for path in (ROOT / room).glob("*.py") for name in all_imports(path)]
    assert {part[1] for part in parts if part[0] == "delo_llava"} <= GROUND


@pytest.mark.parametrize("library", ONE_PLACE)
def test_slow_and_optional_libraries_are_imported_in_their_places(library: str) -> None:
    found = {name_of(p) for p in modules() if library in {name.split(".")[0] for name in all_imports(p)}}
    assert found == ONE_PLACE[library]


def test_what_the_library_names_in_strings_is_known_and_there() -> None:
    found = {
        (path.relative_to(LIBRARY).as_posix(), node.value)
        for path in LIBRARY.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith("delo_eval.") and node.value.replace(".", "_").isidentifier()
    }
    assert found == NAMED_BY_THE_LIBRARY
    assert all(find_spec(name) is not None for _, name in found)
