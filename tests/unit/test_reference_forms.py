"""References that have not the form that their task's scorer needs."""

from typing import Any

import pytest

from delo_llava.data_tools import forms
from delo_llava.data_tools.forms import reference_faults
from delo_llava.tasks import Record


def reference(answer: str, instruction: str = "Q?", **extra: Any) -> Record:
    return Record("r", "t", "test", None, None, instruction, answer, extra)


@pytest.mark.parametrize(
    ("scorer", "record", "told"),
    [
        ("grounding", reference("[0.1, 0.2, 0.5, 0.9]"), None),
        ("grounding", reference("left"), "is no box"),
        ("grounding", reference("[0.1, 0.2, 0.5]"), "is no box"),
        ("grounding", reference("[0.5, 0.2, 0.1, 0.9]"), "without area"),
        ("grounding", reference("x", answer_bbox="[1, 2, 3, 4]"), None),
        ("scienceqa", reference("B", "What?\nA. red\nB. blue"), None),
        ("scienceqa", reference("C", "What?\nA. red\nB. blue"), "not among the choices A, B"),
        ("scienceqa", reference("red"), "is no letter"),
        ("textvqa", reference("a", answers=["a"] * 10), None),
        ("textvqa", reference("a", answers=["a"] * 9), "10 answers of people: 9"),
        ("textvqa", reference("a", answers=["a"] * 9 + [" "]), "1 of the 10 answers are empty"),
        ("exact_match", reference("a"), None),
    ],
)
def test_references_have_the_form_of_their_scorer(
    scorer: str, record: Record, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "load_plugin", lambda kind, name: type("S", (), {"needs": ("answers",)}))
    found = reference_faults(scorer)(record)
    absent = [("extra_missing", f"{scorer} needs `answers`, which is absent or empty")]
    assert [fault for fault in found if fault[0] == "extra_missing"] == (
        [] if "answers" in record.extra else absent
    )
    forms_found = [message for code, message in found if code == "answer_form"]
    assert len(forms_found) == (told is not None)
    assert told is None or told in forms_found[0]
