"""Scorers: what counts as right."""

import pytest

from delo_eval.scorers.base import Reference
from delo_eval.scorers.exact_match import SCORER
from delo_llava.registry import load_plugin, plugin_names


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("red", "red"),
        (" Red\n", "red"),
        ("red.", "Red"),
        ("MANGO", "mango"),
        ("yes .", "yes"),
        ("B", "b."),
        ("st. lucia.", "St. Lucia"),
        ("9...", "9"),
        ("red . .", "red"),
    ],
)
def test_right(prediction: str, answer: str) -> None:
    assert SCORER(prediction, Reference("q", answer)) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("", "red"),
        (" . ", "red"),
        (".", "."),
        ("a red", "red"),
        ("redd", "red"),
        ("no", "yes"),
        ("r ed", "red"),
    ],
)
def test_wrong(prediction: str, answer: str) -> None:
    assert SCORER(prediction, Reference("q", answer)) == 0.0


def test_scorers_are_found_by_file_name_and_carry_versions() -> None:
    assert "exact_match" in plugin_names("scorer") and "base" not in plugin_names("scorer")
    assert load_plugin("scorer", "exact_match") is SCORER
    assert SCORER.id == "exact_match.v2" and SCORER.rule
