"""A folder with references and answers for `delo-eval score`, and the command run in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from delo_eval.cli import main

WORDS = ["red", "blue", "green", "two", "yes"]
ASK = "What is it?\nAnswer the question using a single word or phrase."


def entries(answers: Sequence[str] = WORDS) -> list[dict[str, Any]]:
    return [{"question_id": i, "text": ASK, "answer": answer} for i, answer in enumerate(answers)]


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(texts: dict[int, str]) -> list[dict[str, Any]]:
    """Rows as CoIN's model scripts write them."""
    rest = {"prompt": ASK, "answer_id": "abc", "model_id": "m", "metadata": {}}
    return [{"question_id": i, "text": text, **rest} for i, text in texts.items()]


class Bench:
    """A folder with references and answers, and the command run in it."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.references(entries())

    def references(self, content: Any) -> None:
        (self.root / "test.json").write_text(json.dumps(content))

    def answers(self, rows: Sequence[dict[str, Any]], name: str = "answers.jsonl") -> Path:
        (self.root / name).write_text(lines(rows))
        return self.root / name

    def score(self, scorer: str, *words: str, answers: str = "answers.jsonl") -> dict[str, Any]:
        """What the command writes."""
        asked = [str(self.root / answers), "--scorer", scorer, "--references", str(self.root / "test.json")]
        output = self.root / "scores.json"
        assert main(["score", *asked, "--output", str(output), *words]) == 0
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    def refused(self, scorer: str, *words: str, answers: str = "answers.jsonl") -> str:
        """What the command says when it refuses."""
        with pytest.raises(SystemExit) as caught:
            self.score(scorer, *words, answers=answers)
        assert caught.value.code == 2
        return self.capsys.readouterr().err
