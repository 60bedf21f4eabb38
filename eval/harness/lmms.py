"""A saved stage as a model of lmms-eval (`--model delo_llava --model_args run=runs/x,stage=last`).

Imported by lmms-eval alone, through the entry point `lmms_eval.models`; its interface is that of 0.7.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from delo_eval.answers.question import Question
from delo_eval.harness.saved import MAX_NEW_TOKENS, SavedStage
from delo_llava.data.collate import IGNORE, Collator
from delo_llava.data.layouts import IMAGE_PLACEHOLDER
from delo_llava.data.pixels import as_seen
from delo_llava.engines.launched import launched
from delo_llava.errors import DeloError
from delo_llava.tasks import Record


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="delo_llava", simple_class_path=f"{__name__}.DeloLlava")


class DeloLlava(lmms):
    """A run's model after one of its stages, in one process.

    Args:
        run: folder of the run.
        stage: an index from 0, a task's name, `last`, or `zero-shot`.
        task: the task of the run to answer as; without it the method chooses one for every question.
        device: `auto`, `cpu`, `cuda` or `cuda:1`; by default what the run's configuration says.

    Raises:
        DeloError: no such run, stage or task, a method that needs the task without one, or several processes.
    """

    is_simple = True

    def __init__(
        self,
        run: str,
        stage: str | int = "last",
        task: str | None = None,
        batch_size: str | int = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if (world := launched().world) != 1:
            raise DeloError("This model of lmms-eval runs in one process.", given=world, allowed=[1])
        self._stack = ExitStack()
        self._stage = self._stack.enter_context(SavedStage(run, stage, task, device))
        self._folder = Path(self._stack.enter_context(TemporaryDirectory()))
        self._ready, self.device, opened = self._stage.ready, self._stage.device, self._stage.run
        self.task, self.batch_size = task, int(batch_size)
        self._trained_form = Collator(
            opened.backbone,
            opened.processor,
            opened.config.data.max_length,
            opened.config.missing.image,
            rooms=self._stage.rooms,
        )

    def clean(self) -> None:
        """Free the model and the pictures."""
        self._stack.close()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests of (context, generation arguments, doc_to_visual, doc id, task, split).

        Raises:
            DeloError: sampling is asked for, or a question has several images.
        """
        said: dict[int, str] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_decoding(request.args[1]), []).append(i)
        for (tokens, beams), members in groups.items():
            self._ready.beams = beams
            for some in self._batches(members):
                questions = [self._question(requests[i].args) for i in some]
                for i, text in zip(some, self._stage.answers(questions, tokens), strict=True):
                    said[i] = _until(text, requests[i].args[1].get("until"))
        return [said[i] for i in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log probability, whether greedy decoding says it) of each continuation, its end token not counted.

        Requests are (context, continuation or doc_to_target, doc_to_visual, doc id, task, split).
        """
        found: list[tuple[float, bool]] = []
        for some in self._batches(range(len(requests))):
            items = [self._continued(requests[i].args) for i in some]
            batch = self._trained_form.collate(items).to(self.device)
            tasks = [self.task] * len(items) if self.task else self._chosen(batch)
            with self._ready.method.answering(self._ready.model, batch, tasks):
                logits = self._ready.model(**batch.inputs).logits[:, :-1].float()
            assert batch.labels is not None
            labels = batch.labels[:, 1:]
            for row, label in zip(logits, labels, strict=True):
                place = (label != IGNORE).nonzero().flatten()[:-1]
                scores = row[place].log_softmax(-1)
                token = label[place]
                total = scores.gather(1, token[:, None]).sum()
                found.append((float(total), bool((scores.argmax(-1) == token).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there: the models are trained on single turns.

        Raises:
            DeloError: always.
        """
        raise DeloError("A saved stage answers single turns only.", given="generate_until_multi_round")

    def _chosen(self, batch: Any) -> list[str] | None:
        """The method's choice for each row; None for methods, and for the bare base, that have none."""
        if not self._ready.trained or not self._ready.method.capabilities.chooses_task:
            return None
        choice = self._ready.method.choose(self._ready.model, batch)
        return None if choice is None else choice.names

    def _batches(self, members: Sequence[int]) -> list[Sequence[int]]:
        return [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]

    def _question(self, args: tuple[Any, ...], answer: str = "") -> Question:
        context, _, doc_to_visual, doc_id, task, split = args
        document = self.task_dict[task][split][doc_id]
        pictures = doc_to_visual(document) or []
        if len(pictures) > 1:
            raise DeloError("A question has one image at most.", given=f"{len(pictures)} in {task}/{doc_id}")
        image = self._saved(pictures[0]) if pictures else None
        text = str(context).replace(IMAGE_PLACEHOLDER, "").strip()
        record = Record(f"{task}/{doc_id}", self.task or task, "test", image, None, text, answer)
        return Question(record, (image is not None, False))

    def _continued(self, args: tuple[Any, ...]) -> tuple[Record, tuple[bool, bool]]:
        """One request of `loglikelihood` as a record with its answer."""
        _, target, _, doc_id, task, split = args
        text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        question = self._question(args, str(text))
        return question.record, question.presence

    def _saved(self, picture: Any) -> Path:
        """A picture as the file that records name, once for each content.

        Raises:
            DeloError: it cannot be shown faithfully.
        """
        try:
            plain = as_seen(picture)
        except ValueError as error:
            raise DeloError(f"A picture of lmms-eval's cannot be shown: {error}", given=picture) from error
        name = hashlib.sha256(repr(plain.size).encode() + plain.tobytes()).hexdigest()
        path = self._folder / f"{name}.png"
        if not path.exists():
            plain.save(path)
        return path


def _decoding(given: dict[str, Any]) -> tuple[int, int]:
    """(most new tokens, beams) of generation arguments; answers are never sampled.

    Raises:
        DeloError: sampling is asked for.
    """
    if given.get("do_sample") or float(given.get("temperature") or 0) > 0:
        raise DeloError("Answers are not sampled.", given=given, fix="add --gen_kwargs temperature=0")
    return int(given.get("max_new_tokens") or MAX_NEW_TOKENS), int(given.get("num_beams") or 1)


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """`text` up to the first of `stops`."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
