"""A run's model as one object that answers: it writes the prompt, chooses the task and routes by itself."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from delo_eval.answers.question import Answer, Question
from delo_eval.harness.generate import Answerer
from delo_eval.harness.model import answerer, open_run
from delo_eval.harness.run import stages_named
from delo_llava.backbones.base import resolve_device
from delo_llava.errors import DeloError
from delo_llava.tasks import Record

#: Tokens of an answer where nothing says how many.
MAX_NEW_TOKENS = 128


class SavedStage:
    """The model after one stage of a run, held until `close`, in one process.

        with SavedStage("runs/x") as model:
            print(model.answer("Which animal is it?", image="cat.png", context="Seen in 2021."))

    Args:
        run: folder of the run.
        stage: an index from 0, a task's name, `last`, or `zero-shot`.
        task: the task of the run to answer as; without it the method chooses one for every question.
        device: `auto`, `cpu`, `cuda` or `cuda:1`; by default what the run's configuration says.

    Raises:
        DeloError: no such run, stage or task, or a method that needs the task without one.
    """

    def __init__(
        self,
        run: Path | str,
        stage: str | int = "last",
        task: str | None = None,
        device: str | None = None,
    ) -> None:
        self.run, self.task = open_run(Path(run)), task
        stages = stages_named(str(stage), self.run)
        if len(stages) != 1:
            raise DeloError("One stage answers at a time.", given=stage, fix="name it, such as stage=last")
        known = self.run.plan.seen(stages[0])
        if task is not None and task not in known:
            raise DeloError("This stage was not trained on that task.", given=task, allowed=known)
        if task is None and known and self.run.method.capabilities.needs_task:
            raise DeloError(
                f"{self.run.config.method} cannot choose a task.",
                allowed=known,
                fix="name one: task=…",
            )
        self.device = resolve_device(device or self.run.config.device)
        #: Task -> tokens that the answers to the questions at hand may have.
        self.rooms: dict[str, int] = {}
        self._stack = ExitStack()
        self.ready: Answerer = self._stack.enter_context(
            answerer(self.run, stages[0], self.device, self.rooms)
        )
        self.ready.oracle = False

    def close(self) -> None:
        """Free the model."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def answer(
        self,
        instruction: str,
        image: Path | str | None = None,
        context: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> str:
        """The greedy answer to one question; a picture or context that is not given counts as missing."""
        return self.answers([self.question(instruction, image, context)], max_new_tokens)[0]

    def question(
        self,
        instruction: str,
        image: Path | str | None = None,
        context: str | None = None,
        name: str = "asked",
    ) -> Question:
        """A question of no data set, for `answers`."""
        picture = None if image is None else Path(image)
        record = Record(name, self.task or "", "test", picture, context, instruction, "")
        return Question(record, (picture is not None, bool(context)))

    def answers(self, questions: Sequence[Question], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The answers to a batch of questions, in their order."""
        return [answer.prediction for answer in self.answered(questions, max_new_tokens)]

    def answered(self, questions: Sequence[Question], max_new_tokens: int = MAX_NEW_TOKENS) -> list[Answer]:
        """As `answers`, with all that is known of each; of a task that was told there is no choice."""
        self.rooms.update({question.record.task: max_new_tokens for question in questions})
        if self.task is None:
            return self.ready.answer(questions, max_new_tokens)
        said = self.ready.decode(questions, [self.task] * len(questions), max_new_tokens)
        return [Answer(one.text, None, unended=() if one.ended else ("prediction",)) for one in said]
