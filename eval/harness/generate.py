"""Batched decoding of one task's questions: task choice first, then greedy or beam search.

Batches are made from the sorted questions before they are dealt to the ranks, so their composition, and with
it every last bit of the arithmetic, does not depend on how many ranks there are.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from delo_eval.answers.question import Answer, Flags, Question
from delo_llava.backbones.base import Backbone, Parts
from delo_llava.config import RunConfig
from delo_llava.data.collate import Batch, Collator
from delo_llava.data.images import UnusableImage
from delo_llava.methods.base import Method, Past, TaskChoice
from delo_llava.tasks import Record

#: The evidence left when the instruction's words may not be used to choose the task.
VIEWS_WITHOUT_INSTRUCTION = ("image", "text")


class Tokenizer(Protocol):
    """What decoding needs of a tokenizer."""

    pad_token_id: int | None
    eos_token_id: int | None

    def batch_decode(self, sequences: Tensor, *, skip_special_tokens: bool) -> list[str]:
        """Texts of a B×S batch of ids."""
        ...


class Said(NamedTuple):
    """A generated text, and whether an end token closed it (else the number of new tokens did)."""

    text: str
    ended: bool


@dataclass
class Answerer:
    """A loaded model with all it takes to answer questions.

    Attributes:
        model: the PEFT model (or the bare base for the zero-shot row), in evaluation mode on `device`.
        collate: a generation collator's `collate` (pads left, leaves the answer out).
        trained: tasks that `model` has been trained on, in order; empty for the zero-shot row.
        beams: 1 is greedy.
    """

    model: nn.Module
    method: Method
    collate: Callable[[Sequence[tuple[Record, Flags]]], Batch]
    tokenizer: Tokenizer
    device: torch.device
    trained: tuple[str, ...]
    beams: int = 1
    #: Ids of tokens that end an answer, besides those of the tokenizer and of the checkpoint.
    ends: tuple[int, ...] = ()
    #: Turned off, the true task is given to no method that can do without.
    oracle: bool = True
    #: A record whose image cannot be used is answered by nothing instead of ending the evaluation.
    skip_bad_images: bool = False

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """Answers to one batch of questions of one task, in their order.

        Raises:
            UnusableImage: an image cannot be used, and such records are not to be skipped.
        """
        try:
            return self._answer(questions, max_new_tokens)
        except UnusableImage:
            if not self.skip_bad_images:
                raise
        faults = {i: fault for i, q in enumerate(questions) if (fault := self._image_fault(q)) is not None}
        rest = [q for i, q in enumerate(questions) if i not in faults]
        said = iter(self._answer(rest, max_new_tokens) if rest else [])
        return [self._unseen(q, faults[i]) if i in faults else next(said) for i, q in enumerate(questions)]

    @torch.inference_mode()
    def _answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """As `answer`; all images must be usable."""
        batch, can = self._batch(questions), self.method.capabilities
        if self.trained and can.chooses_task:
            answers = self._answer_with_choice(questions, max_new_tokens, batch)
        else:
            tasks = [q.record.task for q in questions] if self.trained and can.needs_task else None
            said = self.decode(questions, tasks, max_new_tokens, batch)
            answers = [_answer(one, one if self.trained else None) for one in said]
        return [replace(a, cut=tuple(batch.cut.get(row, ()))) for row, a in enumerate(answers)]

    def _image_fault(self, question: Question) -> str | None:
        """What is wrong with the question's image, None where it can be used."""
        try:
            self.collate([(question.record, question.presence)])
        except UnusableImage as fault:
            return fault.message
        return None

    def _unseen(self, question: Question, fault: str) -> Answer:
        """The empty answer to a question whose image cannot be used: wrong in every mode that exists."""
        can, known = self.method.capabilities, question.record.task in self.trained
        told = bool(self.trained) and (not can.chooses_task or (self.oracle and known))
        return Answer("", "" if told else None, image_fault=fault)

    def _answer_with_choice(
        self, questions: Sequence[Question], max_new_tokens: int, batch: Batch
    ) -> list[Answer]:
        """Choose each row's task, answer as that task, and as the true one where the choice was another.

        A row without evidence is answered as the first trained task, and says so; one for which the method
        failed to choose is answered by nothing, with the true task as ever.
        """
        choice, blind = self._choice(batch), self._choice(batch, VIEWS_WITHOUT_INSTRUCTION)
        used = choice.names
        predictions = self.decode(questions, used, max_new_tokens, batch)
        oracle = self._oracle(questions, used, predictions, max_new_tokens)
        scores = [_finite(dict(zip(choice.tasks, row, strict=True))) for row in choice.scores.tolist()]
        predictions = [
            Said("", True) if lost else said for said, lost in zip(predictions, choice.voided, strict=True)
        ]
        kinds = {
            "task_used": _unvoided(choice), "task_without_instruction": _unvoided(blind),
            "void": choice.voided, "void_without_instruction": blind.voided,
        }  # fmt: skip
        fallbacks = [tuple(n for n, said in kinds.items() if said[row]) for row in range(len(questions))]
        rows = zip(predictions, oracle, used, blind.names, scores, fallbacks, strict=True)
        return [
            replace(
                _answer(said, told), task_used=task, task_without_instruction=without, choice_scores=of_tasks,
                fallback=fallback,
            )
            for said, told, task, without, of_tasks, fallback in rows
        ]  # fmt: skip

    def _choice(self, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        """The method's choice; a method that declares to choose must."""
        choice = self.method.choose(self.model, batch, views)
        if choice is None:
            raise TypeError(
                f"{type(self.method).__name__} declares chooses_task but its choose() returned None"
            )
        return choice

    def _oracle(
        self,
        questions: Sequence[Question],
        used: Sequence[str],
        predictions: Sequence[Said],
        max_new_tokens: int,
    ) -> list[Said | None]:
        """Predictions with the true task; routes do not depend on the batch, so right choices share them."""
        texts: list[Said | None] = list(predictions)
        if not self.oracle:
            return [None] * len(texts)
        wrong = [i for i, q in enumerate(questions) if used[i] != q.record.task]
        again = [i for i in wrong if questions[i].record.task in self.trained]
        true = [questions[i].record.task for i in again]
        decoded = self.decode([questions[i] for i in again], true, max_new_tokens) if again else []
        told = dict(zip(again, decoded, strict=True))
        for i in wrong:
            texts[i] = told.get(i)
        return texts

    def _batch(self, questions: Sequence[Question]) -> Batch:
        return self.collate([(q.record, q.presence) for q in questions]).to(self.device)

    @torch.inference_mode()
    def decode(
        self,
        questions: Sequence[Question],
        tasks: Sequence[str] | None,
        max_new_tokens: int,
        batch: Batch | None = None,
    ) -> list[Said]:
        """Generated texts, without prompt and special tokens.

        Args:
            tasks: the task to answer as, for each question; None for methods that use none.
            batch: the collated questions, if they are there already.
        """
        batch = batch or self._batch(questions)
        settings = decoding(self.tokenizer, self.model, max_new_tokens, self.beams, self.ends)
        with self.method.answering(self.model, batch, tasks, self.beams) as prompt:
            ids: Tensor = cast(Any, self.model).generate(**prompt.inputs, generation_config=settings)
        new = ids[:, prompt.skip :]
        ended = torch.isin(new, torch.tensor(settings.eos_token_id, device=new.device)).any(1)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [Said(*pair) for pair in zip(texts, ended.tolist(), strict=True)]


def _unvoided(choice: TaskChoice) -> list[bool]:
    """Which rows showed nothing to choose by."""
    return [none and not lost for none, lost in zip(choice.fallback, choice.voided, strict=True)]


@contextmanager
def loaded(
    config: RunConfig,
    backbone: Backbone,
    model_path: str,
    processor: Parts,
    method: Method,
    past: Mapping[str, Past],
    trained: tuple[str, ...],
    device: torch.device,
    rooms: Mapping[str, int],
) -> Iterator[Answerer]:
    """A model loaded for answering, freed at the end.

    Args:
        processor: the base's, from `backbone.load_processor`.
        past: finished stages in the order of training; none is the bare base.
        trained: the tasks that they trained.
        rooms: most tokens of an answer by task, see `Collator`.
    """
    base = backbone.load(
        model_path, quant=config.quant, dtype=config.dtype, attn=config.attn, device=str(device)
    )
    ready = Answerer(
        model=method.load(base, past).eval(),
        method=method,
        collate=Collator(
            backbone, processor, config.data.max_length, config.missing.image, generation=True, rooms=rooms
        ),
        tokenizer=processor.tokenizer,
        ends=(processor.tokenizer.convert_tokens_to_ids(processor.dialogue.end),),
        device=device,
        trained=trained,
        beams=config.eval.num_beams,
        oracle=config.eval.oracle,
        skip_bad_images=config.data.on_bad_image == "skip",
    )
    del base
    try:
        yield ready
    finally:
        del ready.model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _answer(said: Said, told: Said | None) -> Answer:
    """What was said with the task that was chosen, and with the true one."""
    both = {"prediction": said, "oracle_prediction": told}
    unended = tuple(name for name, each in both.items() if each is not None and not each.ended)
    return Answer(said.text, None if told is None else told.text, unended=unended)


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """Scores as JSON can hold them: None where a sample shows nothing to judge a task by."""
    return {task: score if isfinite(score) else None for task, score in scores.items()}


def batches(questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Questions in batches of similar length, longest first: memory peaks at once, padding stays small.

    Characters stand in for tokens, and prompts with an image come before those without: exact lengths would
    cost a tokenisation and gain little.
    """

    def length(question: Question) -> tuple[bool, int, str]:
        record, (image, text) = question.record, question.presence
        words = len(record.instruction) + (len(record.context or "") if text else 0)
        return image and record.image is not None, words, record.id

    ordered = sorted(questions, key=length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def decoding(
    tokenizer: Tokenizer, model: nn.Module, max_new_tokens: int, beams: int, more_ends: Sequence[int] = ()
) -> GenerationConfig:
    """Plain greedy or beam search, until the tokenizer's, the checkpoint's or one of `more_ends` tokens.

    Whatever the checkpoint's generation_config.json asks for (Qwen2-VL: sampling and a repetition penalty) is
    overridden, since unset values would be taken from there; only its end-of-sequence tokens are kept.
    """
    own: Any = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None) or []
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    listed = ends if isinstance(ends, list) else [ends]
    stops = sorted({tokenizer.eos_token_id, *listed, *more_ends} - {None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        early_stopping=False,
        min_new_tokens=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        pad_token_id=pad,
        eos_token_id=stops,
    )
