"""Under which keys an answer file's rows hold the question's id and the answer: known layouts, else an error.

Other tools put the reference beside the model's output, or the question under `text`. What can be read in two
ways is refused, never guessed at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from delo_llava.errors import DeloError

ID_KEYS = ("question_id", "record_id", "questionId", "id", "image_id", "image")

#: Keys that hold a model's output and nothing else.
OUTPUT_KEYS = (
    "prediction", "pred", "response", "output", "outputs", "model_output", "model_answer", "model_response",
    "pred_answer", "predicted_answer", "generated_text", "generation", "completion",
)  # fmt: skip
#: Keys that hold an output in some layouts, and a question or a reference in others.
OPEN_KEYS = ("text", "answer", "caption")

#: Texts that say nothing of the answer, beside any key.
BESIDE = {*ID_KEYS, "question", "prompt", "instruction", "task", "answer_id", "model_id", "model", "category"}

#: Whole layouts, CoIN's rows and this project's predictions: keys that mark one -> (the key of its answers,
#: other texts that it has).
LAYOUTS: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("prompt", "text"): ("text", ()),
    ("record_id", "prediction"): ("prediction", ("answer",)),
}


@dataclass(frozen=True)
class Columns:
    """The keys of id and answer; the id's is None where rows are paired by line."""

    id: str | None
    text: str

    def __str__(self) -> str:
        return f"`{self.text}` by " + ("line" if self.id is None else f"`{self.id}`")


def columns_of(row: Any, where: str, *, key: str | None = None, by_line: bool = False) -> Columns:
    """The keys of a row.

    Args:
        where: file and row, for errors.
        key: the answer's key as the user names it.
        by_line: no id is needed.

    Raises:
        DeloError: no object; no id; no answer, or several keys that may be one.
    """
    if not isinstance(row, dict):
        raise DeloError(f"{where} is not an object.", given=repr(row)[:80])
    name = None if by_line else next((one for one in ID_KEYS if row.get(one) is not None), None)
    if name is None and not by_line:
        raise DeloError(
            f"{where} has no id.",
            given=", ".join(row),
            allowed=ID_KEYS,
            fix="where the n-th answer belongs to the n-th question, say --by-line",
        )
    if key is not None and key not in row:
        raise DeloError(f"{where} has no `{key}`.", given=", ".join(row), fix="correct --key")
    return Columns(name, key or _text_key(row, where))


def _text_key(row: Mapping[str, Any], where: str) -> str:
    """The key of the answer in a row that names it itself.

    Raises:
        DeloError: no key that is known, or several that may be meant.
    """
    found = [key for key in (*OUTPUT_KEYS, *OPEN_KEYS) if key in row]
    for marks, (text, others) in LAYOUTS.items():
        if all(key in row for key in marks) and set(found) <= {text, *others}:
            return text
    if not found:
        raise DeloError(
            f"{where} has no text.",
            given=", ".join(row),
            allowed=(*OUTPUT_KEYS, *OPEN_KEYS),
            fix="name the key of the answers: --key NAME",
        )
    unknown = {key for key, value in row.items() if isinstance(value, str)} - {*found, *BESIDE}
    unsure = sorted(unknown) if found[0] in OPEN_KEYS else []
    if len(found) > 1 or unsure:
        raise DeloError(
            f"{where} holds several texts that may be the answer.",
            given=", ".join([*found, *unsure]),
            fix="name the key of the model's answers: --key NAME",
        )
    return found[0]
