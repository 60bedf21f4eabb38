"""A question to a model and what it says to it: what decoding, stored answers and predictions share."""

from dataclasses import dataclass

from delo_llava.tasks import Record

#: Whether image and context text may be seen.
Flags = tuple[bool, bool]


@dataclass(frozen=True, slots=True)
class Question:
    """A record and which of its modalities (image, text) the model may see."""

    record: Record
    presence: Flags


@dataclass(frozen=True)
class Answer:
    """What the model said to one question.

    Attributes:
        prediction: with the task the method chose (or needs none of).
        oracle: with the true task; equals `prediction` where the choice was right; None where no true task
            can be given.
        task_used: the chosen task, None for methods that do not choose.
        task_without_instruction: the choice from image and context alone.
        choice_scores: score per trained task, higher is likelier.
        fallback: which of `task_used` and `task_without_instruction` are no choice, as the sample showed
            nothing to judge a task by, but the first trained task; and `void` or `void_without_instruction`,
            where the method should have chosen and did not (the answer is empty then, and wrong).
        image_fault: why the record's image could not be used; the answer is empty then, and wrong.
        cut: which parts of the prompt (`context`, `instruction`) were cut to `data.max_length`.
        unended: which of `prediction` and `oracle_prediction` were ended by the number of new tokens instead
            of an end token.
    """

    prediction: str
    oracle: str | None
    task_used: str | None = None
    task_without_instruction: str | None = None
    choice_scores: dict[str, float | None] | None = None
    image_fault: str | None = None
    fallback: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    unended: tuple[str, ...] = ()
