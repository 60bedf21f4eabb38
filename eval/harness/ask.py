"""Questions of no data set to a run's stages: what each says, as which task, and what it was not shown."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from delo_eval.harness.model import open_run
from delo_eval.harness.run import stages_named
from delo_eval.harness.saved import SavedStage
from delo_eval.tables import rich_table
from delo_llava.backbones.base import quiet_loading
from delo_llava.errors import DeloError
from delo_llava.files import at_home

#: Keys of a question as a JSON object; others are refused.
KEYS = ("question", "image", "context")
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Asked:
    """One question; a picture or context that is None counts as missing."""

    question: str
    image: Path | None = None
    context: str | None = None

    @property
    def missing(self) -> list[str]:
        """Modalities that the model does not see."""
        return [name for name in ("image", "context") if not getattr(self, name)]


@dataclass(frozen=True)
class Reply:
    """What one stage said to one question.

    Attributes:
        stage: its label, `zero-shot` for the base.
        task: that it answered as, by choice or as told; None where the method uses none.
        shares: task -> probability of the choice, for a choice by likelihoods (`lda`); else empty.
        scores: task -> score of the choice, higher is likelier; empty where none was made.
        missing: modalities that it was not shown. cut: parts of the prompt that were cut.
        ended: whether the answer ended by itself, not by the number of tokens.
        seconds: of answering, shared evenly by the questions of a batch. loading: of the model.
    """

    question: str
    stage: str
    answer: str
    task: str | None
    shares: Mapping[str, float]
    scores: Mapping[str, float | None]
    missing: Sequence[str]
    cut: Sequence[str]
    ended: bool
    seconds: float
    loading: float

    def to_json(self) -> dict[str, Any]:
        """As one line of `--json`."""
        return asdict(self)


def read_asked(lines: Iterable[str], image: Path | None, context: str | None) -> list[Asked]:
    """Questions of a file or pipe, one a line: plain text, or a JSON object with `question` and perhaps
    `image` and `context`, which stand in place of those given for all.

    Raises:
        DeloError: a broken object, unknown keys, or no question.
    """
    found = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line.startswith("{"):
            found.append(_object(number, line, image, context))
        elif line:
            found.append(Asked(line, image, context))
    if not found:
        raise DeloError("There is no question.", fix="give one a line, as text or as a JSON object")
    return found


def _object(number: int, line: str, image: Path | None, context: str | None) -> Asked:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DeloError(f"Line {number} is no JSON object: {error.msg}.", given=line[:80]) from error
    unknown = [key for key in entry if key not in KEYS]
    wrong = [key for key, value in entry.items() if value is not None and not isinstance(value, str)]
    if unknown or wrong or not entry.get("question"):
        raise DeloError(
            f"Line {number} is no question: an object has `question`, and texts only.",
            given=", ".join(unknown or wrong or entry),
            allowed=KEYS,
        )
    own = entry.get("image")
    return Asked(entry["question"], at_home(own) if own else image, entry.get("context") or context)


def ask(
    run: Path, stages: Sequence[str], asked: Sequence[Asked], task: str | None, most: int, device: str | None
) -> Iterator[Reply]:
    """The replies of each stage in turn, to all questions.

    Args:
        stages: names, indices, `last`, `zero-shot`, or `all`: the base and every trained stage.
        task: to answer as; without it the method chooses.
        most: tokens of an answer.

    Raises:
        DeloError: no such run, stage, task or picture, or a method that needs the task without one.
    """
    for question in asked:
        if question.image is not None and not question.image.is_file():
            raise DeloError("There is no such picture.", given=question.image)
    quiet_loading()
    for stage in _named(run, stages):
        began = time.monotonic()
        told = None if stage == ZERO_SHOT else task
        with SavedStage(run, stage, told, device) as model:
            loading = time.monotonic() - began
            yield from _replies(model, stage, asked, most, loading)


def _named(run: Path, stages: Sequence[str]) -> list[str]:
    """The stages by name, each once, in the order asked for."""
    opened = open_run(run)
    found: dict[str, None] = {}
    for word in stages:
        indices = [-1, *stages_named("all", opened)] if word == "all" else stages_named(word, opened)
        found |= dict.fromkeys(ZERO_SHOT if i < 0 else opened.plan.names[i] for i in indices)
    return list(found)


def _replies(
    model: SavedStage, stage: str, asked: Sequence[Asked], most: int, loading: float
) -> Iterator[Reply]:
    questions = [
        model.question(one.question, one.image, one.context, name=f"asked-{i}") for i, one in enumerate(asked)
    ]
    began = time.monotonic()
    answers = model.answered(questions, most)
    seconds = (time.monotonic() - began) / len(asked)
    likelihoods = getattr(model.run.method.options, "matcher", None) == "lda"
    for one, answer in zip(asked, answers, strict=True):
        scores = answer.choice_scores or {}
        yield Reply(
            one.question, stage, answer.prediction, answer.task_used or model.task,
            _shares(scores) if likelihoods else {}, scores, one.missing, answer.cut,
            "prediction" not in answer.unended, round(seconds, 3), round(loading, 3),
        )  # fmt: skip


def _shares(scores: Mapping[str, float | None]) -> dict[str, float]:
    """Probabilities of tasks, equally likely before, by their log-likelihoods."""
    known = {task: score for task, score in scores.items() if score is not None}
    top = max(known.values(), default=0.0)
    weights = {task: math.exp(score - top) for task, score in known.items()}
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def shown(replies: Sequence[Reply]) -> Table:
    """Replies to one question, a line for each stage."""
    first = replies[0]
    lacking = f" (without {' and '.join(first.missing)})" if first.missing else ""
    table = rich_table(f"{first.question}{lacking}", ["stage", "answer", "as task", "choice", "s"], words=4)
    for reply in replies:
        answer = reply.answer if reply.ended else f"{reply.answer} …"
        table.add_row(reply.stage, answer, reply.task or "–", _choice(reply), f"{reply.seconds:.2f}")
    return table


def _choice(reply: Reply) -> str:
    """The two likeliest tasks, by probability where there is one, else by score."""
    values = reply.shares or {task: score for task, score in reply.scores.items() if score is not None}
    best = sorted(values.items(), key=lambda item: -item[1])[:2]
    form = "{:.1%}" if reply.shares else "{:.3f}"
    return ", ".join(f"{task} {form.format(value)}" for task, value in best) or "–"
