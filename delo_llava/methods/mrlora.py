"""`mrlora`: a LoRA per task, and one more that reads the question and answers with the letter of a task.

Source: MR-LoRA (arXiv 2506.05453); specification: newer_methods, section 4.

    expert   W + s·B_t A_t, trained on task t alone
    router   W + s·B_r A_r, trained on a few remembered records of every task so far: the prompt ends with a
             list of the tasks with a letter each; the target is the letter
    answer   the router says a letter, greedily; the expert of that letter answers

A letter that is no task's is no choice: the answer is empty, so it is wrong, and stays in the denominator.

needs_task: no. encoders: none. mergeable: no. Bytes per task: two pairs (the router's of the last stage is
used), and about 100 for each of `kept` records, which are read from the task's training file again: it
rehearses. Answering costs one more prefill.

simplified: expert and router of a stage train in the same steps, the router on one remembered record for
each of the task's own, going on from the last one; the paper trains it alone, for some forty epochs. Tasks
are listed by name, those that were trained so far, where the paper describes all of them by hand.
Not reproduced: records that leave the denominator where their letter is another task's or none (T1), or a
task drawn by chance for them (T2).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.carrier import find_carrier, routing
from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, RowPlan, lowrank, mixed, sum_of
from delo_llava.adapters.store import tensor_report
from delo_llava.backbones.base import adapted_linears
from delo_llava.config import TrainConfig
from delo_llava.data.collate import IGNORE, Batch
from delo_llava.data.examples import Examples, Item, View
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.files import write_json_atomic
from delo_llava.methods._lowrank import LowRankMethod, LowRankOptions, activate, lowrank_config
from delo_llava.methods.base import (
    Capabilities,
    Clock,
    Mixture,
    Part,
    Passes,
    Past,
    Prompt,
    Reduce,
    Stage,
    StagePlan,
    TaskChoice,
    answer_logits,
    answer_loss_sum,
)
from delo_llava.methods.replay import MEMORY, recall_all, remember
from delo_llava.strict import read_tensors
from delo_llava.tasks import TaskSequence

#: The router's adapter, its view of a batch, its file, and in that the letters' token ids.
ROUTER, ROUTE, FILE, IDS = "router", "route", "router.safetensors", "letters"
#: A plan's weights of the adapters, and the names of those that any row uses.
WHO, USED = "who", "used"


class MrLoraOptions(LowRankOptions):
    """Options of MR-LoRA.

    Attributes:
        kept: training records of every task that the router learns from (all, where a task has fewer).
        router_lr: peak rate of the router; None: that of the experts.
    """

    kept: int = Field(20, ge=1)
    router_lr: float | None = Field(None, gt=0)


class MrLora(LowRankMethod):
    """Experts that never meet, and a router that is asked in words."""

    Config = MrLoraOptions
    capabilities = Capabilities(chooses_task=True, isolated=True)
    #: The adapters by the columns of a plan, the router last; and the tasks by their letters.
    _names: list[str]
    _tasks: list[str]
    _samples: list[Item]
    #: Token id that each letter of an answer begins with.
    _ids: Tensor

    def stages(self, sequence: TaskSequence) -> tuple[StagePlan, ...]:
        """One per task.

        Raises:
            DeloError: there are more tasks than letters, or one has the router's name.
        """
        if len(sequence.names) > len(LETTERS):
            raise DeloError(
                "There are more tasks than letters", given=len(sequence.names), fix="a shorter sequence"
            )
        if ROUTER in sequence.names:
            raise DeloError("A task may not have the router's name", given=ROUTER, fix="name it otherwise")
        return super().stages(sequence)

    def config(self, base: nn.Module) -> LowRankConfig:
        """A matched rank counts expert and router."""
        widths = sum(map(sum, adapted_linears(base, self.backbone).values()))
        return lowrank_config(self.options, base, self.backbone, self.run, 1, 0, each=widths)

    # ---- what is trained on
    def mixture(self, stage: Stage, own: Examples, past: Mapping[str, Examples]) -> Mixture:
        self._memory = remember(own, self.options.kept, self.run.seed)
        kept = [i for i, (task, name) in enumerate(own.names) if name in self._memory.get(task, {})]
        known = recall_all(stage, past) + own.select(kept)
        self._samples = [known[i] for i in range(len(known))]
        return (Part(own),)

    def views(self, items: Sequence[Item], clock: Clock) -> Mapping[str, View]:
        """For every row of a micro-batch one remembered record, drawn by step and row."""
        shown = []
        for record, _ in items:
            told = f"{self.run.seed}\x1f{clock.step}\x1f{record.task}\x1f{record.id}"
            draw = int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big")
            shown.append(self._asked(self._samples[draw % len(self._samples)]))
        return {ROUTE: View(tuple(range(len(shown))), tuple(shown))}

    def _asked(self, item: Item, views: Sequence[str] = VIEWS) -> Item:
        """A record as the router is asked about it, by some of its views; the answer is its task's letter."""
        record, has = item
        listed = "\n".join(f"{x}: {task}" for x, task in zip(LETTERS, self._tasks, strict=False))
        asked = f"Which kind of question is this?\n{listed}\nAnswer with the letter."
        words = f"{record.instruction}\n{asked}" if "instruction" in views else asked
        letter = LETTERS[self._tasks.index(record.task)] if record.task in self._tasks else LETTERS[0]
        shown = tuple(there and view in views for there, view in zip(has, VIEWS, strict=False))
        return replace(record, instruction=words, answer=letter), (shown[0], shown[1])

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        self._tasks, self._names = [*stage.past, stage.name], [stage.name, ROUTER]
        model = self.fresh(base, stage.name)
        _add_router(model, stage.name, list(stage.past.values())[-1].folder if stage.past else None)
        activate(model, self._names, train=self._names)
        return mixed(model, self.mix, self.who)  # type: ignore[no-any-return]

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        """The router may have a rate of its own."""
        groups, rate = super().groups(model, train), self.options.router_lr
        if rate is None:
            return groups
        router = {id(p) for name, p in model.named_parameters() if f".{ROUTER}." in name}
        split = [
            (group, [p for p in group["params"] if (id(p) in router) == is_router], is_router)
            for group in groups
            for is_router in (False, True)
        ]
        return [g | {"params": kept} | ({"peak": rate} if own else {}) for g, kept, own in split]

    def counts(self, batch: Batch) -> dict[str, float]:
        return super().counts(batch) | {ROUTE: super().counts(batch.views[ROUTE].batch)["answer"]}

    def weights(self, clock: Clock) -> dict[str, float]:
        return super().weights(clock) | {ROUTE: 1.0}

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        asked = batch.views[ROUTE].batch
        return {
            name: self._loss(model, part, who)
            for name, part, who in (("answer", batch, self._names[0]), (ROUTE, asked, ROUTER))
        }

    def _loss(self, model: nn.Module, batch: Batch, who: str) -> Tensor:
        assert batch.labels is not None
        with routing(model, RouteInputs.from_batch(batch, tasks=who)):
            return answer_loss_sum(answer_logits(model, batch), batch.labels)

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Which token each letter is, as the family's dialogue writes answers."""
        sums = torch.zeros(len(self._tasks) + 1, dtype=torch.float64)
        for batch in passes.drawn(1, size=1):
            if not batch.filler and batch.again is not None:
                (record, _), *_ = batch.items
                rows = [(replace(record, answer=x), (False, False)) for x in LETTERS[: len(self._tasks)]]
                sums += torch.cat([_first_answer_tokens(batch.again(rows)), torch.ones(1)])
        sums = reduce(sums)
        self._ids = (sums[:-1] / sums[-1].clamp(min=1)).long()
        if len(self._ids.unique()) < len(self._ids):
            raise DeloError(
                "The tokenizer begins the answers of two letters alike", given=self._ids.tolist(),
                fix="choose another method for this family",
            )  # fmt: skip

    # ---- what is kept
    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        write_json_atomic(folder / MEMORY, self._memory)
        held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _router(model).items()}
        save_file(held | {IDS: self._ids}, folder / FILE)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        self._tasks, self._names = list(past), [*past, ROUTER]
        model = self.opened(base, past)
        self._ids = _add_router(model, self._tasks[0], list(past.values())[-1].folder)
        activate(model, self._names, train=[])
        return mixed(model, self.mix, self.who)  # type: ignore[no-any-return]

    # ---- answers
    def who(self, inputs: RouteInputs, queries: Queries) -> RowPlan:
        """Which adapter answers each row, as the caller says."""
        told = inputs.tasks
        assert told is not None
        rows = [told] * len(inputs.input_ids) if isinstance(told, str) else list(told)
        used = [name for name in self._names if name in rows]
        weights = torch.tensor([[float(name == row) for name in used] for row in rows])
        return RowPlan({WHO: weights.to(inputs.input_ids.device)}, inputs, {USED: used})

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """Each row's own adapter, and no product for one that no row uses."""
        plan: RowPlan = layer.carrier.current()
        used: list[str] = plan.extra[USED]
        if len(used) == 1:
            return sum_of(layer, used, x)
        shares = plan.at(layer, WHO, x).unbind(-1)
        parts = zip(used, shares, strict=True)
        added = [layer.up(n, layer.down(n, x) * share.unsqueeze(-1)) for n, share in parts]
        return torch.stack(added).sum(0)

    @torch.no_grad()
    def choose(self, model: nn.Module, batch: Batch, views: Sequence[str] | None = None) -> TaskChoice:
        """The letter that the router says first; where that is no task's, no choice."""
        if find_carrier(model) is None:
            raise DeloError("No task was trained yet, so none can be chosen", fix="train a stage first")
        assert batch.again is not None
        asked = batch.again([self._asked(item, views or VIEWS) for item in batch.items])
        asked = asked.to(batch.segments.device)
        with routing(model, RouteInputs.from_batch(asked, tasks=ROUTER)):
            logits = model(**asked.inputs).logits
        said = _before_answer(asked, logits).double().log_softmax(-1)
        scores = said[:, self._ids.to(said.device)]
        legal = said.max(-1).values == scores.max(-1).values
        return TaskChoice(tuple(self._tasks), torch.where(legal, scores.argmax(-1), -1), scores, void=~legal)

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        if find_carrier(model) is None or tasks is None:  # the bare base of the zero-shot row
            yield Prompt.of(batch)
            return
        with routing(model, RouteInputs.from_batch(batch, tasks=list(tasks), expand=beams)):
            yield Prompt.of(batch)


def _first_answer_tokens(batch: Batch) -> Tensor:
    """The first token of each row's answer, float64."""
    assert batch.labels is not None
    return batch.labels.gather(1, _answer_starts(batch.labels).unsqueeze(1))[:, 0].double()


def _before_answer(batch: Batch, logits: Tensor) -> Tensor:
    """What is said first, B×V: behind a question, which ends its row, or in an answer's place."""
    if batch.labels is None:
        return logits[:, -1]
    return logits[torch.arange(len(logits), device=logits.device), _answer_starts(batch.labels) - 1]


def _answer_starts(labels: Tensor) -> Tensor:
    """Where each row's answer begins, int64 B."""
    return (labels != IGNORE).int().argmax(1)


def _router(model: nn.Module) -> dict[str, Tensor]:
    """The router's pairs by the names of the linears."""
    layers = [layer for part in lowrank(model).layers() for layer in part]
    return {
        f"{layer.name}.{side}": tensor
        for layer in layers
        for side, tensor in zip("AB", layer.pair(ROUTER), strict=True)
    }


def _add_router(model: Any, like: str, folder: Path | None) -> Tensor:
    """A router of the shape of the adapter `like`, from a finished stage or fresh; the letters' token ids.

    Raises:
        DeloError: the file is missing or damaged, or does not fit.
    """
    model.add_adapter(ROUTER, copy(model.peft_config[like]))
    if folder is None:
        return torch.zeros(0, dtype=torch.int64)
    found, own = read_tensors(folder / FILE, "The router", "train the stage again"), _router(model)
    ids = found.pop(IDS, torch.zeros(0, dtype=torch.int64))
    report = tensor_report({n: t.shape for n, t in own.items()}, {n: t.shape for n, t in found.items()})
    if report or not len(ids):
        raise DeloError(
            "\n".join(["The router does not fit:", *report]), given=folder / FILE, fix="train again"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return ids


METHOD = MrLora
