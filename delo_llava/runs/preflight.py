"""Before the first step, the data of all stages to come: every prompt is tried, every picture looked for.

A fault in the last task's records would otherwise end a run after days; and what a user ought to know of the
data (no picture anywhere, turns without what was said before them) would be told by nothing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from delo_llava.data.answers import accepted_answers, require_scorable, usable_records
from delo_llava.data.collate import Collator, Layout
from delo_llava.data.examples import Item, shown
from delo_llava.data.missing import Presence, limited, pattern_spec, record_presence
from delo_llava.data.omitted import LABELS
from delo_llava.data.readers import Records, read_records
from delo_llava.data.tokens import beyond_reach
from delo_llava.errors import DeloError
from delo_llava.runs.job import Job
from delo_llava.runs.stage import examples_of, training_records
from delo_llava.tasks import Split, StagePlan, TaskSpec
from delo_llava.training.fit import Kit
from delo_llava.training.pictures import Pictures, picture_of

#: Records that are tokenised together; records told of in a message.
BATCH, SHOWN = 256, 8

WITHOUT = "put a file there that can be used, or go on without such records: --data.on_bad_image=skip"


@dataclass
class Preflight:
    """One look at what a run has still to do; nothing is trained, and no weights are loaded.

    Attributes:
        faults: what would stop the run later.
        notes: what would not, and should be known.
    """

    job: Job
    kit: Kit
    faults: list[DeloError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def pictures(self) -> Pictures:
        """What is known of the run's pictures."""
        return Pictures(self.kit, self.job.config.data.max_length)

    def run(self, left: Sequence[StagePlan], evaluates: bool) -> list[str]:
        """Look at the training records of the stages that are left and, if the run evaluates, at what all
        tasks are asked.

        Returns:
            the notes.

        Raises:
            DeloError: records that a stage or an evaluation would refuse; the first ones by file and id.
        """
        tasks = {task.name: task for task in self.job.sequence.tasks}
        for plan in left:
            lost = sum(self._trained(tasks[name]) for name in plan.tasks)
            self._judge_lost(plan.name, lost)
        for task in tasks.values() if evaluates else ():
            self._asked(task, self.job.config.eval.split)
        for task in self.job.general if evaluates else ():
            self._asked(task, "test")
        own = {
            plan.name: examples_of(self.job.config, [tasks[name] for name in plan.tasks])
            for plan in self.job.plans
        }
        self.notes += self.job.method.remarks(own)
        if self.faults:
            raise _refused(self.faults)
        return self.notes

    def _trained(self, task: TaskSpec) -> int:
        """Look at a task's training records; returns how many are left out for want of their picture."""
        config = self.job.config
        records = training_records(config, task)
        self._describe(task, "train")
        return self._look(task, "train", records, record_presence(config.missing, records))

    def _asked(self, task: TaskSpec, split: Split) -> None:
        """Look at the questions of a task, with all that any pattern shows."""
        config = self.job.config
        records = read_records(task, split)
        self._describe(task, split)
        patterns = {*config.eval.patterns, *config.eval.last_patterns}
        masks = [record_presence(pattern_spec(name, config.missing), records) for name in patterns]
        try:
            asked = usable_records(task, records, config.eval.scoring, config.eval.on_bad_reference)
        except DeloError as error:
            self.faults.append(error)
            return
        if out := len(records) - len(asked):
            self.notes.append(f"{task.name}/{split}: {LABELS['references_missing']}: {out} of {len(records)}")
        ids = [records.ids[i] for i in asked]
        kept = [asked[i] for i in limited(ids, task.name, split, config.eval.limit)]
        self._references(task, split, records.select(kept))
        if lost := self._look(task, split, records.select(kept), np.logical_or.reduce(masks)[kept]):
            told = f"{task.name}/{split}: questions whose pictures cannot be used: {lost}"
            self.notes.append(f"{told}; they are answered by nothing")

    def _references(self, task: TaskSpec, split: Split, records: Records) -> None:
        """Say to how many questions no right answer can be generated; a reference that the scorer cannot use
        is a fault."""
        kit, room, left = self.kit.processor, task.max_new_tokens, iter(records)
        scoring, long = self.job.config.eval.scoring, 0
        try:
            require_scorable(task, records, scoring)
        except DeloError as error:
            self.faults.append(error)
        right = accepted_answers(task, scoring)
        while part := list(islice(left, BATCH)):
            accepted = []
            for record in part:
                try:
                    accepted.append(right(record))
                except DeloError as error:
                    self._fault(task, split, record.id, error)
            long += sum(beyond_reach(kit.tokenizer, kit.dialogue, accepted, room))
        if long:
            told = f"{task.name}/{split}: {LABELS['references_long']} ({room}): {long} of {len(records)}"
            self.notes.append(f"{told}; raise it in the recipe")

    def _describe(self, task: TaskSpec, split: Split) -> None:
        """Note that a split lacks pictures or contexts altogether, or is shown without its earlier turns."""
        records = read_records(task, split)
        what = f"of the {len(records)} {'training records' if split == 'train' else f'{split} questions'}"
        if not records.natural[:, 0].any():
            self.notes.append(f"{task.name}: none {what} has a picture")
        missing = self.job.config.missing
        if missing.ratio and missing.kind != "image" and not records.natural[:, 1].any():
            told = f"{task.name}: none {what} has a context"
            self.notes.append(f"{told}, so --missing.kind {missing.kind} takes none away")
        if later := len(records) - records.conversations:
            self.notes.append(
                f"{task.name}: {later} {what} are later turns of a conversation, each shown without those "
                "before it, unlike in LLaVA's own training"
            )

    def _look(self, task: TaskSpec, split: Split, records: Records, mask: Presence) -> int:
        """Try every prompt and look for every picture; returns how many missing ones the run passes over."""
        collator = self.kit.collator(self.job.config, generation=split != "train")
        unusable: dict[str, tuple[str, int]] = {}
        cut: Counter[str] = Counter()
        items = zip(records, mask.tolist(), strict=True)
        while part := [(record, (flags[0], flags[1])) for record, flags in islice(items, BATCH)]:
            self.pictures.look([path for item in part if (path := picture_of(item))])
            usable = []
            for item in part:
                if (path := picture_of(item)) in self.pictures.unusable:
                    first, count = unusable.get(path, (item[0].id, 0))
                    unusable[path] = first, count + 1
                else:
                    usable.append((item, self._layout(path)))
            for item, error in _tried(collator, usable, cut):
                self._fault(task, split, item[0].id, error)
        if cut:
            told = "; ".join(f"{LABELS[f'{name}s_cut']}: {count}" for name, count in sorted(cut.items()))
            self.notes.append(f"{task.name}/{split}: {told} of {len(records)}")
        return self._unusable(task, split, unusable)

    def _layout(self, path: str) -> Layout | None:
        """What the placeholder of a record becomes; the path is empty where no picture is shown."""
        if path:
            return self.pictures.layout(path)
        return self.pictures.dummy if self.job.config.missing.image == "dummy" else None

    def _unusable(self, task: TaskSpec, split: Split, found: Mapping[str, tuple[str, int]]) -> int:
        """Judge pictures that cannot be used, each with its (first record, number of records)."""
        if self.job.config.data.on_bad_image == "skip":
            return sum(count for _, count in found.values())
        for path, (record, _) in found.items():
            told = f"its picture cannot be used: {self.pictures.unusable[path]}"
            self._fault(task, split, record, DeloError(told, given=path, fix=WITHOUT))
        return 0

    def _judge_lost(self, stage: str, lost: int) -> None:
        """Training records that are left out: a note, or too many."""
        limit = self.job.config.data.max_bad_images
        told = f"{stage}: training records whose pictures cannot be used: {lost}"
        if lost > limit:
            fix = "put the files there, or raise data.max_bad_images"
            self.faults.append(DeloError(told, given=f"data.max_bad_images={limit}", fix=fix))
        elif lost:
            self.notes.append(f"{told}; they are left out")

    def _fault(self, task: TaskSpec, split: Split, record: str, error: DeloError) -> None:
        told = f"{task.files[split]} ({task.name}/{split}, id {record}): {error.message}"
        self.faults.append(DeloError(told, given=error.given, fix=error.fix))


def _tried(
    collator: Collator, items: Sequence[tuple[Item, Layout | None]], cut: Counter[str]
) -> Iterator[tuple[Item, DeloError]]:
    """The items that are refused, with the reason; tried one by one only where any is.

    Args:
        items: each with what its picture becomes.
        cut: counts the parts that are cut of the others.
    """
    if not items:
        return
    records, images = [record for (record, _), _ in items], [image for _, image in items]
    try:
        rows = collator.layout(records, [shown(item) for item, _ in items], images)
    except DeloError as error:
        if len(items) == 1:
            yield items[0][0], error
        else:
            for one in items:
                yield from _tried(collator, [one], cut)
    else:
        cut.update(part for row in rows for part in row.cut)


def _refused(faults: Sequence[DeloError]) -> DeloError:
    """One error for all that was found."""
    lines = [f"{len(faults)} fault{'s' if len(faults) > 1 else ''} would stop this run later:"]
    for fault in faults[:SHOWN]:
        lines.append(f"  {fault.message}" + (f" ({fault.given})" if fault.given is not None else ""))
    if len(faults) > SHOWN:
        lines.append(f"  … and {len(faults) - SHOWN} more; `delo-llava data check` finds all")
    fixes = dict.fromkeys(fault.fix for fault in faults if fault.fix)
    return DeloError("\n".join(lines), fix="; ".join(fixes) + "; nothing was trained by this launch")
