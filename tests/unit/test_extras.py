"""Dependencies are what every user needs; whatever needs more says which extra, before anything heavy."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import delo_llava
from delo_llava.cli import resolve
from delo_llava.errors import DeloError
from delo_llava.extras import PACKAGES, require_extra
from delo_llava.mini.build import MINI6, ensure_mini6
from delo_llava.mini.fixtures import write_fixture

ROOT = Path(delo_llava.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SMALL = {"train": 16, "val": 1, "test": 8}

#: Core dependencies that no module names: transformers reads `tokenizer.model` and places models with them.
UNNAMED = {"accelerate", "protobuf", "sentencepiece"}
#: Packages that are named and come with a core dependency, whose public face they belong to.
BROUGHT = {"huggingface-hub": "transformers", "markupsafe": "jinja2", "pydantic-core": "pydantic"}
#: Named, and no dependency: it pins other versions (docs/lmms_eval.md).
FOREIGN = {"lmms-eval"}


def plain(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, this project left out."""
    found = {plain(re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]) for line in requirements}
    return found - {"delo-llava"}


def imported(*folders: str) -> set[str]:
    """The distributions from which modules import anything, anywhere."""
    roots: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        roots |= set(_roots(path))
    ours = {"delo_llava", "delo_eval", "delo_recipes", "delo_ds_configs", *sys.stdlib_module_names}
    known = packages_distributions()
    return {plain(known.get(root, [root])[0]) for root in roots - ours}


def _roots(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


CORE = named(PROJECT["dependencies"])
EXTRAS = {name: named(lines) for name, lines in PROJECT["optional-dependencies"].items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a small mini6."""
    return ensure_mini6(tmp_path_factory.mktemp("mini"), SMALL).parent


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no extra were installed."""
    for name in {name for names in PACKAGES.values() for name in names}:
        monkeypatch.setitem(sys.modules, name, None)


def test_every_dependency_is_needed_and_every_need_is_declared() -> None:
    found = imported("delo_llava", "eval")
    assert found - FOREIGN - EXTRAS["mini"] - EXTRAS["cuda"] - BROUGHT.keys() == CORE - UNNAMED
    assert found & BROUGHT.keys() == BROUGHT.keys() and set(BROUGHT.values()) <= CORE and UNNAMED <= CORE


def test_the_workshop_s_packages_are_its_extra_s() -> None:
    assert imported("tools") - {"tools"} <= CORE | EXTRAS["mini-base"]
    assert "delo-llava[mini]" in PROJECT["optional-dependencies"]["mini-base"]


def test_the_packages_that_are_looked_for_are_those_of_the_extras() -> None:
    known = packages_distributions()
    found = {extra: {plain(known[name][0]) for name in names} for extra, names in PACKAGES.items()}
    assert found == {  # `tokenizers` comes with transformers
        "mini": EXTRAS["mini"],
        "mini-base": EXTRAS["mini"],
        "captions": EXTRAS["captions"],
        "track": EXTRAS["track"],
    }


def test_the_lock_holds_every_extra_but_the_one_for_gpus() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = {plain(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    wanted = CORE.union(*(names for extra, names in EXTRAS.items() if extra != "cuda"))
    assert wanted <= locked and not EXTRAS["cuda"] & locked


def test_an_extra_that_is_there_is_enough_and_one_that_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for extra in PACKAGES:
        require_extra(extra, "This")
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DeloError) as told:
        require_extra("mini", "This")
    assert str(told.value).splitlines() == [
        "This needs packages that are not installed.",
        "  given:   easy_vqa",
        "  fix:     pip install 'delo-llava[mini]'",
    ]


@pytest.mark.usefixtures("bare")
def test_mini6_needs_its_extra_only_while_it_is_not_built(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeloError, match=r"pip install 'delo-llava\[mini\]'"):
        ensure_mini6(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(built))
    assert resolve(["--task_seq=mini6", f"--output={tmp_path / 'run'}"]).task_seq == "mini6"


@pytest.mark.usefixtures("bare")
def test_a_fixture_that_needs_words_says_so_and_others_are_written(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = built / MINI6.version
    with pytest.raises(DeloError, match=r"pip install 'delo-llava\[mini\]'"):
        write_fixture("mm_imdb_cmml", tmp_path / "words", 4, mini)
    assert not (tmp_path / "words").exists()
    ucit = write_fixture("ucit", tmp_path / "ucit", 4, mini)
    run = [f"--output={tmp_path / 'run'}", f"--data.root={ucit}", "--task_seq=ucit"]
    with pytest.raises(DeloError, match=r"pip install 'delo-llava\[captions\]'"):
        resolve(run)


@pytest.mark.usefixtures("bare")
def test_event_files_need_their_extra(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(built))
    with pytest.raises(DeloError, match=r"(?s)train\.tensorboard.*pip install 'delo-llava\[track\]'"):
        resolve(["--task_seq=mini6", f"--output={tmp_path / 'run'}", "--train.tensorboard=true"])


WITHOUT = "import sys\nfor name in {names!r}:\n    sys.modules[name] = None\n"
TRAIN = """
from delo_llava.cli import main
try:
    main(["train", "--task_seq=mini6", "--output=run"])
except SystemExit as left:
    assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)
    sys.exit(left.code)
"""
CARD = """
import runpy
sys.argv = ["card", "--output=card.md"]
runpy.run_module("tools.mini_base.card", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "what", "extra"),
    [(TRAIN, "Building mini6", "mini"), (CARD, "The data card", "mini-base")],
)
def test_a_command_says_so_before_anything_heavy_is_loaded(
    command: str, what: str, extra: str, tmp_path: Path
) -> None:
    names = sorted({name for names in PACKAGES.values() for name in names})
    env = os.environ | {"DELO_LLAVA_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names) + command],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith(f"error: {what} needs packages that are not installed.\n")
    assert done.stderr.endswith(f"  fix:     pip install 'delo-llava[{extra}]'\n")
