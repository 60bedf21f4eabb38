"""The registry finds plug-ins by file name, imports only what is asked for, and names what exists."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from delo_llava import registry
from delo_llava.errors import DeloError
from delo_llava.registry import PluginKind, load_plugin, plugin_limits, plugin_names, plugin_summary


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package of plug-ins of kind `toy` and a folder of data files of kind `sheet`."""
    package = tmp_path / "toy_shelf"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "red.py").write_text('"""A red one.\n\nMore."""\nTOY = "red object"\n')
    (package / "broken.py").write_text("import not_installed_anywhere\n")
    (package / "empty.py").write_text('"""Has no TOY."""\n')
    (package / "_helper.py").write_text("raise RuntimeError('helpers are not imported')\n")
    (package / "base.py").write_text("raise RuntimeError('base is not a plug-in')\n")
    (package / "one.yaml").write_text('title: "One sheet"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds = {
        "toy": PluginKind("toy_shelf", "toys", attribute="TOY"),
        "sheet": PluginKind("toy_shelf", "sheets", suffix=".yaml"),
    }
    monkeypatch.setattr(registry, "KINDS", kinds)
    registry._entry_points.cache_clear()
    yield package
    registry._entry_points.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_shelf"]:
        del sys.modules[name]


def test_names_are_files_without_helpers(shelf: Path) -> None:
    assert plugin_names("toy") == ["broken", "empty", "red"]
    assert plugin_names("sheet") == ["one"]


def test_naming_imports_nothing_and_loading_one_imports_only_that(shelf: Path) -> None:
    plugin_names("toy")
    assert not any(name.startswith("toy_shelf.") for name in sys.modules)
    assert load_plugin("toy", "red") == "red object"
    assert [name for name in sys.modules if name.startswith("toy_shelf.")] == ["toy_shelf.red"]


def test_data_plugins_are_paths(shelf: Path) -> None:
    assert load_plugin("sheet", "one") == shelf / "one.yaml"


def test_new_file_is_found_without_any_edit(shelf: Path) -> None:
    (shelf / "blue.py").write_text("TOY = 'blue object'\n")
    assert load_plugin("toy", "blue") == "blue object"


def test_unknown_name_tells_the_closest(shelf: Path) -> None:
    with pytest.raises(DeloError, match=r"did you mean red\?"):
        load_plugin("toy", "redd")


def test_unknown_kind() -> None:
    with pytest.raises(DeloError, match=r"did you mean method\?"):
        plugin_names("methods")


@pytest.mark.parametrize(("name", "words"), [("broken", "not_installed_anywhere"), ("empty", "no TOY")])
def test_faulty_plugins_are_told(shelf: Path, name: str, words: str) -> None:
    with pytest.raises(DeloError, match=words):
        load_plugin("toy", name)


def test_summary_reads_without_importing(shelf: Path) -> None:
    assert plugin_summary("toy", "red") == "A red one."
    assert plugin_summary("toy", "broken") == ""
    assert plugin_summary("sheet", "one") == "One sheet"
    (shelf / "gold.py").write_text('"""Gold.\n\nMore.\n\nLimits: heavy,\nand dear.\n"""\nTOY = 1\n')
    assert plugin_limits("toy", "gold") == "heavy, and dear."
    assert plugin_limits("toy", "red") == plugin_limits("sheet", "one") == ""
    assert "toy_shelf.red" not in sys.modules


def test_third_parties_come_in_by_entry_points(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "delo_llava.toy": [
            EntryPoint("far", "math:tau", "delo_llava.toy"),
            EntryPoint("red", "math:pi", "x"),
        ],
        "delo_llava.sheet": [EntryPoint("away", "os.path:sep", "delo_llava.sheet")],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    assert plugin_names("toy") == ["broken", "empty", "far", "red"]
    assert load_plugin("toy", "far") == pytest.approx(6.283185307179586)
    with pytest.raises(DeloError, match=r"red\.py and the entry point math:pi"):
        load_plugin("toy", "red")
    assert load_plugin("sheet", "away") == Path("/")


def test_a_plug_in_with_a_shipped_name_is_refused(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = registry.KINDS["toy"].folder
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "red.py").write_text("TOY = 'another'")
    monkeypatch.setenv(registry.PLUGINS_ENV, str(tmp_path))
    with pytest.raises(DeloError, match=f"{tmp_path}.*red.py and .*red.py"):
        load_plugin("toy", "red")


def test_a_broken_entry_point_is_told(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("far", "math:nothing", group)])
    with pytest.raises(DeloError, match="math:nothing"):
        load_plugin("toy", "far")


def test_absent_package_has_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "toy", PluginKind("no_such_package.inside", "none"))
    assert plugin_names("toy") == []


def test_every_shipped_kind_has_names() -> None:
    assert {"delo", "individual", "lora"} <= set(plugin_names("method"))
    assert {"mini6", "coin6"} <= set(plugin_names("recipe"))
    assert {"1", "2", "3", "2_offload"} <= set(plugin_names("zero"))
    assert "exact_match" in plugin_names("scorer")
    assert {"llava", "qwen2_vl", "qwen2_5_vl"} <= set(plugin_names("backbone"))
    assert "ap" in plugin_names("metric")


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from delo_llava.registry import KINDS, plugin_names; [plugin_names(k) for k in KINDS];"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_of_plug_ins_is_found_and_imported(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine" / "toys"
    mine.mkdir(parents=True)
    (mine / "green.py").write_text("TOY = 'green object'\n")
    (mine / "house").mkdir()
    (mine / "house" / "__init__.py").write_text("TOY = 'a folder'\n")
    monkeypatch.setenv(registry.PLUGINS_ENV, str(tmp_path / "mine"))
    assert {"green", "house", "red"} < set(plugin_names("toy"))
    assert [load_plugin("toy", name) for name in ("green", "house")] == ["green object", "a folder"]
    monkeypatch.setenv(registry.PLUGINS_ENV, str(tmp_path / "nowhere"))
    with pytest.raises(DeloError, match="not there"):
        plugin_names("toy")
