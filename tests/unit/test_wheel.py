"""The wheel holds the two libraries with their files and nothing else, and needs no extra to be imported."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import delo_llava
from delo_llava.extras import PACKAGES

ROOT = Path(delo_llava.__file__).parents[1]
#: Folders of a checkout, those included that must stay out of the wheel.
FOLDERS = ("delo_llava", "eval", "data_recipes", "ds_configs", "tools", "tests", "launch", "benchmarks")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked; built of a copy, since building leaves files behind."""
    place = tmp_path_factory.mktemp("wheel")
    source, output = place / "source", place / "output"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    output.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, str(output)], cwd=source, check=True, capture_output=True)
    (made,) = output.iterdir()
    with zipfile.ZipFile(made) as packed:
        packed.extractall(place / "unpacked")
    return place / "unpacked"


def test_it_holds_every_file_of_its_packages_and_no_other(wheel: Path) -> None:
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    wanted = {
        Path(package) / path.relative_to(ROOT / folder)
        for package, folder in folders["package-dir"].items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    about = {path for path in found if path.parts[0].endswith(".dist-info")}
    assert found - about == wanted
    assert not [path for path in found if {"tools", "tests", "pretrain", "gate.py"} & set(path.parts)]


IMPORT = """
import pkgutil, sys
from importlib import import_module
for name in {names!r}:
    sys.modules[name] = None
found = []
for package in ("delo_llava", "delo_eval"):
    module = import_module(package)
    assert module.__file__.startswith({wheel!r}), module.__file__
    found += [each.name for each in pkgutil.walk_packages(module.__path__, package + ".")]
for name in found:
    if name.rpartition(".")[2] not in ("lmms", "__main__"):  # lmms-eval imports the one, the other runs
        import_module(name)
print(len(found))
"""


@pytest.mark.slow
def test_every_module_can_be_imported_without_the_extras(wheel: Path) -> None:
    extras = {name for names in PACKAGES.values() for name in names} | {"pytest", "flash_attn"}
    code = IMPORT.format(names=sorted(extras), wheel=str(wheel))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=wheel, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    assert int(done.stdout) == len([*wheel.glob("delo_llava/**/*.py"), *wheel.glob("delo_eval/**/*.py")]) - 2
