"""Instruction following: which format an instruction asks for, and which answers have it."""

from typing import Any

import pytest

from delo_eval.scorers.base import Reference
from delo_eval.scorers.mif import SCORER, format_of, obeys, official_obeys
from delo_llava.errors import DeloError

LETTER = "Which is a metal?\nAnswer with the option's letter from the given choices directly."
PHRASE = "What letter is on the sign?\nAnswer the question using a single word or phrase."
SENTENCE = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: a man in one word."
YES_NO = "Is it red?\nAnswer yes or no."


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (LETTER, "letter"),
        ("Select the correct letter from the given options to answer the question.", "letter"),
        (PHRASE, "phrase"),
        ("What is it?\nProvide your answer using a word or brief phrase.", "phrase"),
        ("What is it?\nAnswer using a brief phrase or single word.", "phrase"),
        ("Answer the question with a single word or a brief, descriptive phrase.", "phrase"),
        ("Name the letter. Answer with one word.", "phrase"),
        (SENTENCE, "sentence"),
        ("What is it?\nSummarize it using a single, concise sentence.", "sentence"),
        ("How is it?\nExpress your answer in one informative sentence.", "sentence"),
        (BOX, "box"),
        (YES_NO, "yes_no"),
        ("What colour is the car?", None),
        ("", None),
    ],
)
def test_formats_are_read_from_the_last_line(instruction: str, expected: str | None) -> None:
    assert format_of(instruction) == expected


CASES: list[tuple[str, str, str, bool | None, bool | None, dict[str, Any]]] = [
    # instruction, prediction, answer, official, native
    (LETTER, "B", "B", True, True, {}),
    (LETTER, " b ", "B", True, True, {}),
    (LETTER, "(B)", "B", False, True, {}),
    (LETTER, "B. iron", "B", False, False, {}),
    (LETTER, "ß", "B", False, False, {}),
    (LETTER, "", "B", False, False, {}),
    (PHRASE, "stop sign", "stop", True, True, {}),
    (PHRASE, "a red stop sign", "stop", False, True, {}),
    (PHRASE, "It is a sign that says stop", "stop", False, False, {}),
    (PHRASE, "The Lord of the Rings trilogy", "the lord of the rings trilogy", True, True, {}),
    (PHRASE, "Stop. It stops.", "stop", False, False, {}),
    (PHRASE, "", "stop", True, False, {}),
    (SENTENCE, "A man rides a horse.", "", True, True, {}),
    (SENTENCE, "A man rides a horse", "", False, False, {}),
    (SENTENCE, "A man rides a horse!", "", False, True, {}),
    (SENTENCE, "A man rides. He is on a horse.", "", True, False, {}),
    (SENTENCE, "A horse.", "", False, False, {"captions": ["A man rides a horse"]}),
    (SENTENCE, "A horse.", "", True, False, {"captions": ["He rides a horse. He falls."]}),
    (SENTENCE, ".", "He falls.", True, False, {}),
    (BOX, "[0.1, 0.2, 0.3, 0.4]", "", None, True, {}),
    (BOX, "left", "", None, False, {}),
    (YES_NO, "Yes.", "yes", None, True, {}),
    (YES_NO, "maybe", "yes", None, False, {}),
    ("What?", "red", "red", None, None, {}),
]


@pytest.mark.parametrize(("instruction", "prediction", "answer", "official", "native", "extra"), CASES)
def test_official_and_native_results(
    instruction: str,
    prediction: str,
    answer: str,
    official: bool | None,
    native: bool | None,
    extra: dict[str, Any],
) -> None:
    reference = Reference("q", answer, instruction, extra)
    assert obeys(prediction, reference) is native
    assert official_obeys(prediction, reference) is official


def test_as_a_scorer_it_refuses_instructions_without_a_known_format() -> None:
    assert SCORER("B", Reference("q", "B", LETTER)) == 1.0
    assert SCORER.in_mode("compat")("(B)", Reference("q", "B", LETTER)) == 0.0
    with pytest.raises(DeloError, match="no format that is known"):
        SCORER("red", Reference("q", "red", "What colour?"))
