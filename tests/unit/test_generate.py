"""Decoding: many rows equal one row, ranks share the work, the oracle costs only misrouted rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from torch import Tensor

from delo_eval.answers.question import Answer, Question
from delo_eval.harness.generate import Answerer, batches, decoding
from delo_eval.matrix.derived import choice_statistics
from delo_llava.backbones.base import find_backbone
from delo_llava.data.collate import Batch, Collator
from delo_llava.data.images import UnusableImage
from delo_llava.methods.base import Capabilities, Prompt, TaskChoice
from delo_llava.tasks import Record

CPU = torch.device("cpu")
NEW_TOKENS = 6


class Plain:
    """A method that neither chooses nor needs a task; remembers what it was asked to answer as."""

    capabilities = Capabilities()

    def __init__(self) -> None:
        self.asked: list[list[str] | None] = []

    @contextmanager
    def answering(
        self, model: Any, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        self.asked.append(None if tasks is None else list(tasks))
        model.tasks = tasks
        yield Prompt.of(batch)


class Needy(Plain):
    capabilities = Capabilities(needs_task=True)


class Chooser(Plain):
    """Takes records whose id says `lost` for task `a`; without the instruction, everything for task `a`."""

    capabilities = Capabilities(chooses_task=True)

    def choose(self, model: Any, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        right = [
            views is None and "lost" not in name and task == "b"
            for name, task in zip(batch.record_ids, batch.tasks, strict=True)
        ]
        index = torch.tensor([int(r) for r in right])
        return TaskChoice(("a", "b"), index, torch.nn.functional.one_hot(index, 2).float())


class Parrot(torch.nn.Module):
    """Answers with the task it was told, spelled in character codes."""

    tasks: Sequence[str] | None = None

    def generate(self, input_ids: Tensor, generation_config: Any, **_: Any) -> Tensor:
        said = [ord(t) for t in self.tasks] if self.tasks is not None else [ord("?")] * len(input_ids)
        return torch.cat([input_ids, torch.tensor(said)[:, None]], dim=1)


class Letters:
    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, sequences: Tensor, *, skip_special_tokens: bool) -> list[str]:
        return ["".join(map(chr, row)) for row in sequences.tolist()]


def record(
    name: str,
    task: str = "b",
    image: Path | None = None,
    context: str = "",
    instruction: str = "what is shown ?",
) -> Record:
    return Record(name, task, "test", image, context or None, instruction, "red")


def fake_collate(items: Sequence[tuple[Record, tuple[bool, bool]]]) -> Batch:
    empty = torch.empty(0, dtype=torch.int64)
    records = [r for r, _ in items]
    ids = torch.full((len(items), 3), 7)
    return Batch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        None,
        torch.zeros_like(ids, dtype=torch.uint8),
        torch.tensor([p for _, p in items]),
        empty,
        empty,
        None,
        [r.id for r in records],
        [r.task for r in records],
        [r.answer for r in records],
    )


def fake(method: Plain, trained: tuple[str, ...] = ("a", "b"), **options: Any) -> Answerer:
    return Answerer(Parrot(), method, fake_collate, Letters(), CPU, trained, **options)  # type: ignore[arg-type]


def test_a_method_that_chooses_answers_as_chosen_and_the_oracle_only_reruns_misrouted_rows() -> None:
    method = Chooser()
    questions = [Question(record(name), (True, True)) for name in ("x", "lost1", "y", "lost2")]
    answers = fake(method).answer(questions, 1)
    assert [a.prediction for a in answers] == ["b", "a", "b", "a"]
    assert [a.oracle for a in answers] == ["b", "b", "b", "b"]
    assert [a.task_used for a in answers] == ["b", "a", "b", "a"]
    assert [a.task_without_instruction for a in answers] == ["a"] * 4
    assert answers[0].choice_scores == {"a": 0.0, "b": 1.0}
    assert method.asked == [["b", "a", "b", "a"], ["b", "b"]]


class Lost(Chooser):
    """Comes to no choice for records whose id says `void`."""

    def choose(self, model: Any, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        found = super().choose(model, batch, views)
        void = torch.tensor(["void" in name for name in batch.record_ids])
        return TaskChoice(found.tasks, found.index.masked_fill(void, -1), found.scores, void)


def test_a_record_without_a_choice_is_answered_by_nothing_and_stays() -> None:
    """Also where the first task, which it would fall to, is the true one; the true task answers as ever."""
    records = [record("x"), record("void1"), record("void2", task="a")]
    questions = [Question(r, (True, True)) for r in records]
    answers = fake(Lost()).answer(questions, 1)
    assert [a.prediction for a in answers] == ["b", "", ""]
    assert [a.oracle for a in answers] == ["b", "b", "a"]
    assert [a.fallback for a in answers] == [(), *[("void", "void_without_instruction")] * 2]
    rows = [
        {"task": r.task, "task_used": a.task_used, "fallback": a.fallback,
         "task_without_instruction": a.task_without_instruction}
        for r, a in zip(records, answers, strict=True)
    ]  # fmt: skip
    told = choice_statistics(rows, ("a", "b"))
    assert told is not None
    assert told["accuracy"] == pytest.approx(100 / 3), "of all records, not of those with a choice"
    assert told["confusion"] == [[0, 0], [0, 1]] and told["void"] == {"a": 1, "b": 1}
    assert told["fallback"] == {} and told["accuracy_without_instruction"] == 0


def test_nothing_is_decoded_twice_when_every_choice_is_right() -> None:
    method = Chooser()
    fake(method).answer([Question(record("x"), (True, True))], 1)
    assert method.asked == [["b"]]


class Ending(Parrot):
    """Closes answers as task `a` with an end token, and leaves others to the number of tokens."""

    def generate(self, input_ids: Tensor, generation_config: Any, **more: Any) -> Tensor:
        said = super().generate(input_ids, generation_config, **more)
        ends = [int(task == "a") for task in self.tasks or "b" * len(said)]
        return torch.cat([said, torch.tensor(ends)[:, None]], dim=1)


def test_answers_without_an_end_token_are_told() -> None:
    """Each of the two answers by itself: `lost` is answered as `a`, and with the true task as `b`."""
    ready = fake(Chooser())
    ready.model = Ending()
    said = ready.answer([Question(record("lost"), (True, True)), Question(record("x"), (True, True))], 2)
    assert [a.unended for a in said] == [("oracle_prediction",), ("prediction", "oracle_prediction")]
    ready.trained = ()
    assert ready.answer([Question(record("x"), (True, True))], 2)[0].unended == ("prediction",)


def test_an_untrained_task_has_no_oracle() -> None:
    method = Chooser()
    answers = fake(method).answer([Question(record("x", task="next"), (True, True))], 1)
    assert answers[0].prediction == "a" and answers[0].oracle is None
    assert method.asked == [["a"]]


def test_the_oracle_can_be_turned_off() -> None:
    method = Chooser()
    answers = fake(method, oracle=False).answer([Question(record("lost"), (True, True))], 1)
    assert answers[0].prediction == "a" and answers[0].oracle is None and len(method.asked) == 1


def test_methods_without_a_choice() -> None:
    question = [Question(record("x"), (True, True))]
    both = ("prediction", "oracle_prediction")
    assert fake(Plain()).answer(question, 1) == [Answer("?", "?", unended=both)]
    assert fake(Needy()).answer(question, 1) == [Answer("b", "b", unended=both)]
    bare = fake(Chooser(), trained=()).answer(question, 1)
    assert bare == [Answer("?", None, unended=both[:1])], "the bare base has no choice"


def test_batches_hold_every_question_once_longest_first() -> None:
    questions = [
        Question(record(f"r{i}", context="c" * (i * 7 % 11)), (False, i % 2 == 0)) for i in range(23)
    ]
    made = batches(questions, 5)
    assert [len(b) for b in made] == [5, 5, 5, 5, 3]
    flat = [q for batch in made for q in batch]
    assert sorted(q.record.id for q in flat) == sorted(q.record.id for q in questions)
    lengths = [len(q.record.context or "") if q.presence[1] else 0 for q in flat]
    assert lengths == sorted(lengths, reverse=True)
    assert batches(questions[::-1], 5) == made  # not the order of the file


def test_a_broken_picture_ends_the_batch_or_is_an_empty_answer() -> None:
    def collate(items: Sequence[tuple[Record, tuple[bool, bool]]]) -> Batch:
        for asked, _ in items:
            if "broken" in asked.id:
                raise UnusableImage("cannot be used")
        return fake_collate(items)

    questions = [Question(record(name), (True, True)) for name in ("x", "broken", "y", "lost")]
    ready = fake(Chooser())
    ready.collate = collate
    with pytest.raises(UnusableImage):
        ready.answer(questions, 1)
    ready.skip_bad_images = True
    answers = ready.answer(questions, 1)
    assert [a.prediction for a in answers] == ["b", "", "b", "a"]
    assert answers[1] == Answer("", "", image_fault="cannot be used")
    assert ready.answer(questions[1:2], 1) == answers[1:2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def questions(pictures: list[Path]) -> list[Question]:
    """Prompts of many lengths, with and without image and context."""
    contexts = [
        "",
        "the card says mango",
        "a red circle and a blue square with a green triangle",
        "it comes after six",
    ]
    asked = ["what is shown ?", "which color is the circle ? answer with a letter", "is there a circle ?"]
    return [
        Question(
            record(f"r{i}", image=pictures[i % 3], context=contexts[i % 4], instruction=asked[i % 3]),
            (i % 5 != 0, i % 7 != 1),
        )
        for i in range(12)
    ]


def tiny(kind: str, beams: int = 1) -> Answerer:
    backbone, path = find_backbone(tiny_models.session(kind))
    processor = backbone.load_processor(path)
    model = backbone.load(path, quant="none", device="cpu")
    collator = Collator(backbone, processor, 512, generation=True)
    return Answerer(model, Plain(), collator, processor.tokenizer, CPU, ("b",), beams)  # type: ignore[arg-type]


def said(ready: Answerer, questions: Sequence[Question], batch_size: int) -> dict[str, str]:
    made = batches(questions, batch_size)
    answers = [(q, a) for batch in made for q, a in zip(batch, ready.answer(batch, NEW_TOKENS), strict=True)]
    return {q.record.id: answer.prediction for q, answer in answers}


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_many_answers_like_batches_of_one(
    kind: str, beams: int, questions: list[Question]
) -> None:
    ready = tiny(kind, beams)
    one = said(ready, questions, 1)
    assert len(set(one.values())) > 3  # the random model does not say the same to all
    assert said(ready, questions, 12) == one
    assert said(ready, questions[::-1], 5) == one


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_greedy_decoding_equals_a_loop_without_cache_or_padding(kind: str, questions: list[Question]) -> None:
    ready = tiny(kind)
    stops = decoding(ready.tokenizer, ready.model, 1, 1).eos_token_id
    batched = said(ready, questions, 12)
    for question in questions[:6]:
        batch = ready.collate([(question.record, question.presence)])
        inputs, new = dict(batch.inputs), torch.empty(1, 0, dtype=torch.int64)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                token = ready.model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
                new = torch.cat([new, token], 1)
                if int(token) in stops:
                    break
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                if "mm_token_type_ids" in inputs:
                    kinds = inputs["mm_token_type_ids"]
                    inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, 1)], 1)
        assert ready.tokenizer.batch_decode(new, skip_special_tokens=True)[0] == batched[question.record.id]


def test_the_checkpoints_own_decoding_settings_are_overridden(questions: list[Question]) -> None:
    ready = tiny("llava")
    plain = said(ready, questions, 12)
    own = ready.model.generation_config
    own.do_sample, own.temperature, own.top_k, own.repetition_penalty, own.num_beams = True, 5.0, 40, 3.0, 2
    own.no_repeat_ngram_size, own.min_new_tokens, own.max_length = 1, 5, 3
    assert said(ready, questions, 12) == plain


def test_end_tokens_of_tokenizer_and_checkpoint_both_stop() -> None:
    ready = tiny("llava")
    ready.model.generation_config.eos_token_id = [5, 9]
    assert decoding(ready.tokenizer, ready.model, 4, 1).eos_token_id == sorted(
        {5, 9, ready.tokenizer.eos_token_id}
    )
