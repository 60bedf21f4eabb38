"""Files of references: every layout that is read, and what is said of one that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from delo_eval.answers.references import read_references
from delo_eval.scorers.base import Reference
from delo_llava.errors import DeloError

REFERENCES: dict[str, tuple[Any, list[Reference]]] = {
    "coin": (
        [{"question_id": 5, "image": "a/b.jpg", "text": "<image>\nWhat?", "answer": "x", "other": 1}],
        [Reference("5", "x", "What?", {"other": 1}, "t", "b.jpg")],
    ),
    "grounding": (
        [{"question_id": 5, "text": "Where?", "answer_bbox": "[0, 0, 1, 1]", "size": [4, 3]}],
        [Reference("5", "[0, 0, 1, 1]", "Where?", {"answer_bbox": "[0, 0, 1, 1]", "size": [4, 3]}, "t")],
    ),
    "conversation": (
        [{"id": "c", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}],
        [Reference("c", "A", "Q", {"id": "c"}, "t")],
    ),
    "textvqa": (
        {"data": [{"question_id": 1, "question": "Q", "answers": ["a", "b", "b"]}]},
        [Reference("1", "b", "Q", {"answers": ["a", "b", "b"]}, "t")],
    ),
    "vqav2": (
        {"annotations": [{"question_id": 1, "multiple_choice_answer": "a", "answers": [{"answer": "a"}]}]},
        [Reference("1", "a", "", {"multiple_choice_answer": "a", "answers": [{"answer": "a"}]}, "t")],
    ),
    "vizwiz": (
        [{"image": "v.jpg", "question": "Q", "answers": [{"answer": "a"}]}],
        [Reference("v.jpg", "a", "Q", {"answers": [{"answer": "a"}]}, "t", "v.jpg")],
    ),
    "gqa": (
        {"07": {"question": "Q", "answer": "a"}, "03": {"question": "R", "answer": "b"}},
        [Reference("07", "a", "Q", {}, "t"), Reference("03", "b", "R", {}, "t")],
    ),
    "problems": (
        {"4": {"question": "Q", "answer": 0, "choices": ["x", "y"]}},
        [Reference("4", "0", "Q", {"choices": ["x", "y"]}, "t")],
    ),
    "coco": (
        {"annotations": [{"image_id": i, "caption": c} for i, c in ((10, "c"), (2, "a"), (2, "b"))]},
        [
            Reference("2", "a", "", {"captions": ["a", "b"]}, "t"),
            Reference("10", "c", "", {"captions": ["c"]}, "t"),
        ],
    ),
    "list of answers": (
        [{"question_id": 1, "text": "Q", "answer": ["a", "b"]}],
        [Reference("1", "a", "Q", {"answers": ["a", "b"]}, "t")],
    ),
    "repeated ids": (
        [{"question_id": 1, "text": "Q", "answer": "a"}, {"question_id": 1, "text": "R", "answer": "b"}],
        [Reference("1", "a", "Q", {}, "t"), Reference("1~2", "b", "R", {}, "t")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", REFERENCES)
def test_references_of_all_layouts(tmp_path: Path, layout: str) -> None:
    content, expected = REFERENCES[layout]
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert read_references(tmp_path / "r.json", "t") == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds no references"),
        ("3", "none of the known layouts"),
        ("[3]", "is not an object"),
        ('[{"answer": "x"}]', "has no id"),
        ('[{"question_id": 1, "text": "Q"}]', "has no answer"),
    ],
)
def test_faulty_references(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DeloError, match=told):
        read_references(tmp_path / "r.json")
    with pytest.raises(DeloError, match="no such file of references"):
        read_references(tmp_path / "none.json")
