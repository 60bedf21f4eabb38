"""Which source a stored answer depends on: what decides it, by any kind of import, and nothing beside."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from delo_eval.answers.code import OURS, package_hash, plugin_module, plugins_hash, source_hash, sources
from delo_eval.harness import generate
from delo_llava import registry
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_names

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes modules of a package `outside` on the path, given as name=text; `__` stands for a dot."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "__init__.py").touch()

    def written(**modules: str) -> None:
        for name, text in modules.items():
            file = tmp_path / "outside" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            if file.parent.name != "outside":
                (file.parent / "__init__.py").touch()
            file.write_text(text)

    return written


@pytest.mark.parametrize(
    "text",
    [
        "import outside.helper",
        "import outside.helper as h",
        "from outside import helper",
        "from outside.helper import anything",
        "from .helper import anything",
        "from . import helper",
        "def late():\n    from outside.helper import anything",
        "from importlib import import_module\nimport_module('outside.helper')",
        "import outside.between",
    ],
)
def test_what_a_plug_in_imports_counts(write: Write, text: str) -> None:
    write(plugin=text, helper="", other="", between="import outside.helper")
    found = set(sources(["outside.plugin"]))
    assert found - {"outside.between"} == {"outside", "outside.plugin", "outside.helper"}
    assert "outside.plugin" not in sys.modules, "nothing is imported"


def test_imports_for_type_checkers_and_of_other_projects_do_not_count(write: Write) -> None:
    write(plugin="import json\nimport numpy\nif TYPE_CHECKING:\n    import outside.helper", helper="")
    assert set(sources(["outside.plugin"])) == {"outside", "outside.plugin"}


def test_what_of_this_project_a_plug_in_imports_counts(write: Write) -> None:
    write(plugin="from delo_llava.tasks import Record")
    assert {"delo_llava", "delo_llava.tasks"} < set(sources(["outside.plugin"]))


def test_a_package_counts_with_all_it_holds(write: Write) -> None:
    write(plugin__one="", plugin__two="", other="")
    found = set(sources(["outside.plugin"]))
    assert found == {"outside", "outside.plugin", "outside.plugin.one", "outside.plugin.two"}


def test_a_folder_beside_other_plug_ins_is_one_plug_in() -> None:
    assert plugin_module("method", "delo_llava.methods.dac.tuner") == "delo_llava.methods.dac"
    assert plugin_module("method", "delo_llava.methods.lora") == "delo_llava.methods.lora"
    assert plugin_module("method", "somebodys.methods.dac") == "somebodys.methods.dac"


def test_a_plug_in_of_a_folder_counts_with_its_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "methods"
    (folder / "large").mkdir(parents=True)
    (folder / "mine.py").write_text(
        "from delo_llava.methods import _helper\nfrom delo_llava.methods import lora"
    )
    (folder / "_helper.py").touch()
    (folder / "other.py").touch()
    (folder / "large" / "__init__.py").touch()
    (folder / "large" / "tuner.py").touch()
    monkeypatch.setenv("DELO_LLAVA_PLUGINS", str(tmp_path))
    found = sources(["delo_llava.methods.mine"])
    assert found["delo_llava.methods._helper"] == folder / "_helper.py"
    assert "delo_llava.methods.lora" in found and "delo_llava.methods.other" not in found
    assert "delo_llava.methods.large.tuner" in sources(["delo_llava.methods.large"])
    before = plugins_hash()
    (folder / "large" / "tuner.py").write_text("NEW = 1")
    assert plugins_hash() != before


def test_hashes_follow_the_bytes_and_names_of_what_counts(write: Write) -> None:
    def hashed() -> str:
        source_hash.cache_clear()
        return source_hash(("outside.plugin",))

    write(plugin="import outside.helper", helper="A = 1", other="")
    before = hashed()
    write(other="B = 1", further="import outside.plugin")
    assert hashed() == before
    write(helper="A = 2")
    assert hashed() != before
    write(helper="A = 1")
    assert hashed() == before


def test_a_package_s_hash_follows_every_file_in_it(write: Write) -> None:
    def hashed() -> str:
        package_hash.cache_clear()
        return package_hash(("outside",))

    write(one="")
    before = hashed()
    write(two="")
    assert hashed() != before


@pytest.mark.parametrize("name", ["outside.gone", "nobodys.plugin"])
def test_a_module_without_a_file_is_told(write: Write, name: str) -> None:
    with pytest.raises(DeloError, match=f"not found(.|\n)*{name}"):
        sources([name])


CORE = [("delo", "llava"), ("lora", "llava"), ("rebq", "llava"), ("delo", "qwen2_5_vl"), ("delo", "internvl")]
#: Following every import costs a second or two for each pair, so most come in turn.
PAIRS = [
    pytest.param(method, backbone, marks=() if (method, backbone) in CORE else pytest.mark.long)
    for method, backbone in [
        *((name, "llava") for name in plugin_names("method")),
        *(("delo", name) for name in plugin_names("backbone")),
    ]
]


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_shipped_answers_depend_on_their_own_method_and_backbone(method: str, backbone: str) -> None:
    """And on another family only where a family is written as a kind of it."""
    own = {f"delo_llava.methods.{method}", f"delo_llava.backbones.{backbone}"}
    found = sources((generate.__name__, *own))
    shared = {"delo_llava.data.collate", "delo_llava.data.images", "delo_llava.methods.base"}
    assert own | shared | {generate.__name__} <= set(found)
    kin = set(sources((f"delo_llava.backbones.{backbone}",)))
    others = {f"delo_llava.backbones.{name}" for name in plugin_names("backbone")} - own - kin
    assert not others & set(found)
    parts = {tuple(name.split(".")[:2]) for name in found}
    assert not parts & {("delo_eval", room) for room in ("scorers", "metrics", "report", "compare")}


@pytest.mark.parametrize("method", ["delo", "lora", "individual"])
def test_a_method_that_imports_no_other_depends_on_no_other(method: str) -> None:
    found = sources((generate.__name__, f"delo_llava.methods.{method}"))
    assert {name for name in plugin_names("method") if f"delo_llava.methods.{name}" in found} == {method}


def test_only_the_registry_loads_by_a_name_that_cannot_be_followed() -> None:
    """Any other module that did would decide answers unseen."""
    plugins = [f"delo_llava.{kind}s.{name}" for kind in ("method", "backbone") for name in plugin_names(kind)]
    for name, path in sources((generate.__name__, *plugins)).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                assert isinstance(node.args[0], ast.Constant) or name == registry.__name__, name
    assert all(name.partition(".")[0] in OURS for name in plugins)
