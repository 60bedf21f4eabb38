"""`train --help`: every key with default, what is allowed and a meaning."""

from typing import Literal

import pytest
from pydantic import Field

from delo_llava import cli, keys
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_names
from delo_llava.schema import Section


class Inner(Section):
    """Something.

    Attributes:
        depth: how deep, in
            layers; more is slower.
    """

    depth: int = Field(default=3, ge=1)


class Outer(Inner):
    """More.

    Attributes:
        one, other: two of a kind.
        mode: `a` or `b`.

    Not an attribute: this.
    """

    one: float | None = None
    other: bool = True
    mode: Literal["a", "b"] | int = "a"
    inner: Inner = Inner()


def test_meanings_are_read_from_docstrings_of_a_class_and_what_it_comes_from() -> None:
    assert keys.meanings(Outer) == {
        "depth": "how deep, in layers; more is slower.",
        "one": "two of a kind.",
        "other": "two of a kind.",
        "mode": "`a` or `b`.",
    }


def test_keys_tell_default_and_what_is_allowed() -> None:
    found = {key.name: (key.default, key.allowed) for key in keys._keys(Outer, "x.", Outer())}
    assert found == {
        "x.depth": ("3", "≥ 1"),
        "x.one": ("null", ""),
        "x.other": ("true", "true | false"),
        "x.mode": ("a", "a | b | int"),
        "x.inner.depth": ("3", "≥ 1"),
    }


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in keys.run_keys() if not key.meaning] == []


@pytest.mark.parametrize("name", plugin_names("method"))
def test_every_option_of_a_method_has_a_meaning(name: str) -> None:
    assert [key.name for key in keys.method_keys(name) if not key.meaning] == []


@pytest.mark.parametrize("width", [80, 140])
def test_help_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["train", "--help", "--method", "lora"]) == 0
    text = capsys.readouterr().out
    shown = text[text.index("--task_seq=mini6\n") :]
    assert max(map(len, shown.splitlines())) <= width
    assert "--method=delo  (" in text and "--lora.rank=match  (match | int)" in text
    assert "--delo.pool_size" not in text


def test_help_of_an_unknown_method_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--help", "--method=lra"])
    assert "lora" in capsys.readouterr().err and DeloError.exit_code == 2
