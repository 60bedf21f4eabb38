"""One place for what is made once: where it is, and what is said where it cannot be written."""

import os
from pathlib import Path
from typing import Any

import pytest

from delo_llava import cache
from delo_llava.cache import CACHE_ENV, cache_root, writable
from delo_llava.cli import main
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.errors import DeloError
from delo_llava.mini.build import MINI6, ensure_mini6

SMALL = {"train": 2, "val": 1, "test": 1}
REMEDY = rf"set \${CACHE_ENV} to a folder that can be written"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a small mini6."""
    return ensure_mini6(tmp_path_factory.mktemp("mini"), SMALL).parent


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in which nothing can be made, whoever runs the tests."""
    home = tmp_path / "home"
    home.write_text("a file")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv(CACHE_ENV, raising=False)
    return home


def test_the_variable_comes_first_and_home_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_ENV, raising=False)
    assert cache_root() == tmp_path / ".cache/delo_llava"
    monkeypatch.setenv(CACHE_ENV, "")
    assert cache_root() == tmp_path / ".cache/delo_llava"
    monkeypatch.setenv(CACHE_ENV, "/somewhere/else")
    assert cache_root() == Path("/somewhere/else")


def test_what_is_kept_names_the_variable_when_home_cannot_be_written(built: Path, no_home: Path) -> None:
    task = load_sequence("mini6", built).tasks[0]
    for use in (ensure_mini6, lambda: read_records(task, "train")):
        with pytest.raises(DeloError, match=REMEDY) as told:
            use()
        assert str(no_home) in str(told.value)


@pytest.mark.parametrize("command", ["train --task_seq=mini6 --output=x", "data check mini6 --root {built}"])
def test_commands_say_so_before_they_write_anything(
    command: str,
    built: Path,
    no_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(command.format(built=built).split())
    said = capsys.readouterr().err
    assert left.value.code == 2 and CACHE_ENV in said and "The cache cannot be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_user_without_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE_ENV, raising=False)
    monkeypatch.setattr(cache.Path, "home", homeless)
    with pytest.raises(DeloError, match=REMEDY):
        cache_root()


def test_a_folder_without_rights_is_refused_and_what_it_holds_still_read(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(path: Any, mode: int) -> bool:
        return False

    monkeypatch.setenv(CACHE_ENV, str(built))
    task = load_sequence("mini6").tasks[0]
    assert len(read_records(task, "train")) == SMALL["train"]
    monkeypatch.setattr(os, "access", refused)
    with pytest.raises(DeloError, match="no right to write"):
        writable(tmp_path)
    assert ensure_mini6() == built / MINI6.version and len(read_records(task, "train")) == SMALL["train"]
