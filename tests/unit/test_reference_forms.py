"""References that have not the form that their task's scorer needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from delo_llava.backbones.base import find_backbone
from delo_llava.data.answers import accepted_answers, require_scorable, usable_records
from delo_llava.data.tokens import answer_lengths, beyond_reach
from delo_llava.data_tools import forms
from delo_llava.data_tools.forms import reference_faults, right_answers
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, TaskSpec


def reference(answer: str, instruction: str = "Q?", **extra: Any) -> Record:
    return Record("r", "t", "test", None, None, instruction, answer, extra)


def task(scorer: str) -> TaskSpec:
    return TaskSpec("t", "k", {}, Path("/"), scorer)


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
    found = reference_faults(task(scorer))(record)
    absent = [("extra_missing", f"{scorer} needs `answers`, which is absent or empty")]
    assert [fault for fault in found if fault[0] == "extra_missing"] == (
        [] if "answers" in record.extra else absent
    )
    forms_found = [message for code, message in found if code == "answer_form"]
    assert len(forms_found) == (told is not None)
    assert told is None or told in forms_found[0]


MANY = {"answers": ["two words", "word", " ", "word"], "captions": ["a caption", "another one"]}


@pytest.mark.parametrize("scoring", ["native", "compat"])
@pytest.mark.parametrize(
    ("scorer", "accepted"),
    [
        ("vqav2", ["two words", "word"]), ("textvqa", ["two words", "word"]),
        ("vizwiz", ["two words", "word"]), ("anls", ["two words", "word"]),
        ("mllm_acl_ocr", ["two words", "word"]), ("caption", ["a caption", "another one"]),
        ("gqa", ["b"]), ("scienceqa", ["B"]),
    ],
)  # fmt: skip
def test_scorers_say_which_answers_count(scorer: str, accepted: list[str], scoring: str) -> None:
    """Each once and none blank; a rule that reads one answer has that one."""
    record = reference("b", **MANY)
    assert accepted_answers(task(scorer), scoring)(record) == accepted
    assert right_answers(task(scorer), "train")(record) == ["b"], "what is trained, whatever counts"


def test_where_no_list_is_given_the_answer_counts() -> None:
    assert accepted_answers(task("anls"), "native")(reference("b", answers=[" "])) == ["b"]
    assert accepted_answers(task("imagenet"), "native")(reference("b", **MANY)) == ["two words", "word"]
    assert accepted_answers(task("imagenet"), "compat")(reference("b", **MANY)) == ["b"]
    assert accepted_answers(task("exact_match"), "native")(reference("b", **MANY)) == ["b"]


def test_a_reference_that_its_rule_cannot_read_is_told_once() -> None:
    unknown = reference("??")
    with pytest.raises(DeloError, match="letter or an index"):
        accepted_answers(task("scienceqa"), "native")(unknown)
    assert [code for code, _ in reference_faults(task("scienceqa"))(unknown)] == ["answer_form"]
    assert right_answers(task("scienceqa"), "test")(unknown) == ["??"]


def test_a_question_is_out_of_reach_if_every_answer_is_too_long() -> None:
    backbone, path = find_backbone(str(tiny_models.session("llava")))
    kit = backbone.load_processor(path)
    short, long = "red", "red blue red blue"
    most, above = answer_lengths(kit.tokenizer, kit.dialogue, [short, long])
    accepted = [[short], [long], [long, short], [short, long], [long, f"{long} red"]]
    for bound, expected in (
        (most, [False, True, False, False, True]),
        (most - 1, [True] * 5),
        (above, [False] * 5),
    ):
        assert beyond_reach(kit.tokenizer, kit.dialogue, accepted, bound) == expected
    assert beyond_reach(kit.tokenizer, kit.dialogue, [], 1) == []


def test_records_without_what_their_scorer_needs_are_found() -> None:
    rows = [reference("a", answers=["a"]), reference("b"), reference("c", answers=["c"])]
    with pytest.raises(DeloError, match=r"/q\.json \(t/test\): .* 1 of 3 have none") as error:
        require_scorable(replace(task("vqav2"), files={"test": Path("/q.json")}), rows, "native")
    assert error.value.given == "r" and "on_bad_reference=skip" in str(error.value.fix)
    assert usable_records(task("vqav2"), rows, "native", "skip") == [0, 2]
    assert usable_records(task("vqav2"), rows, "native", "error") == [0, 1, 2]
    with pytest.raises(DeloError, match="No question of t can be scored"):
        usable_records(task("vqav2"), rows[1:2], "native", "skip")
    assert usable_records(task("exact_match"), rows, "native", "skip") == [0, 1, 2]


def test_questions_that_do_not_count_are_left_out_too() -> None:
    rows = [reference("a", isBalanced=balanced) for balanced in (True, False, True, False)]
    assert usable_records(task("gqa"), rows, "native", "skip") == [0, 2]
    with pytest.raises(DeloError, match="2 of 4 questions do not count"):
        require_scorable(replace(task("gqa"), files={"test": Path("/q.json")}), rows, "native")
    people = [reference("a", answers=["a"] * count) for count in (9, 10)]
    assert usable_records(task("textvqa"), people, "compat", "skip") == [1]
    assert usable_records(task("textvqa"), people, "native", "skip") == [0, 1]
