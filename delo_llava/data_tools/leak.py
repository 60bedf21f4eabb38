"""How well the words of a record alone tell its task: what a choice of the task is worth on this data.

A method that chooses the task of a record may have read nothing but the wording of its instruction. So a
small classifier that knows words and nothing else (multinomial naive Bayes, equal priors, add-one smoothing)
is trained on the training records and asked the test records.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from delo_llava.data.readers import read_records
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, Split, TaskSequence

#: What may tell the task -> the words of it.
VIEWS: Mapping[str, Callable[[Record], str]] = {
    "instruction": lambda record: record.instruction,
    "first word of the instruction": lambda record: " ".join(record.instruction.split()[:1]),
    "context": lambda record: record.context or "",
}
_WORD = re.compile(r"[^\W_]+")
#: Most records of a task that are learned from, and that are asked.
MOST = 20_000
#: Words shown of each task.
SHOWN = 4


@dataclass(frozen=True)
class Leak:
    """What one view tells.

    Attributes:
        right: per cent of the test records that have words, for each task; mean: over tasks.
        asked: those records, for each task; chance: per cent, 100 ÷ tasks.
        telling: the words of each task that speak for it most, against all others together.
    """

    view: str
    right: Mapping[str, float]
    mean: float
    chance: float
    asked: Mapping[str, int]
    telling: Mapping[str, Sequence[str]]


class Words:
    """Multinomial naive Bayes over words.

    Args:
        texts: task -> training texts.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        counts = {
            task: Counter(word for text in given for word in words_of(text)) for task, given in texts.items()
        }
        self.tasks = tuple(counts)
        self.vocabulary = {word: i for i, word in enumerate(sorted(set().union(*counts.values())))}
        table = np.ones((len(counts), len(self.vocabulary)))
        for row, found in zip(table, counts.values(), strict=True):
            for word, count in found.items():
                row[self.vocabulary[word]] += count
        #: T×V, log-likelihood of each word.
        self.likelihood: NDArray[np.float64] = np.log(table / table.sum(1, keepdims=True))

    def choose(self, text: str) -> str:
        """The likeliest task; of equal ones the first. Words never seen say nothing."""
        known = [self.vocabulary[word] for word in words_of(text) if word in self.vocabulary]
        return self.tasks[int(self.likelihood[:, known].sum(1).argmax())]

    def telling(self, task: str) -> list[str]:
        """The words that speak for a task most, against the likeliest of all others."""
        own = self.tasks.index(task)
        if len(self.tasks) < 2 or not self.vocabulary:
            return []
        others = np.delete(self.likelihood, own, 0).max(0)
        order = np.argsort(-(np.exp(self.likelihood[own]) * (self.likelihood[own] - others)), kind="stable")
        names = list(self.vocabulary)
        return [names[i] for i in order[:SHOWN] if self.likelihood[own, i] > others[i]]


def words_of(text: str) -> list[str]:
    """Its words, lower-cased, without punctuation."""
    return _WORD.findall(text.casefold())


def leaks(sequence: TaskSequence, split: Split = "test") -> list[Leak]:
    """What each view tells of the tasks of a sequence; a view that no record has words of is left out.

    Raises:
        DeloError: one task alone, or data that cannot be read.
    """
    if len(sequence.tasks) < 2:
        raise DeloError("One task cannot be mistaken for another.", given=", ".join(sequence.names))
    train, test = (
        {t.name: list(_some(read_records(t, s))) for t in sequence.tasks} for s in ("train", split)
    )
    found = []
    for view, text in VIEWS.items():
        asked = {
            task: [said for record in given if words_of(said := text(record))] for task, given in test.items()
        }
        if all(asked.values()):
            model = Words({task: map(text, given) for task, given in train.items()})
            found.append(_leak(view, model, asked))
    return found


def _some(records: Iterable[Record]) -> Iterator[Record]:
    return islice(iter(records), MOST)


def _leak(view: str, model: Words, asked: Mapping[str, Sequence[str]]) -> Leak:
    right = {
        task: 100 * sum(model.choose(text) == task for text in texts) / len(texts)
        for task, texts in asked.items()
    }
    return Leak(
        view,
        right,
        sum(right.values()) / len(right),
        100 / len(right),
        {task: len(texts) for task, texts in asked.items()},
        {task: model.telling(task) for task in asked},
    )


def leak_json(sequence: TaskSequence, found: Sequence[Leak]) -> dict[str, Any]:
    """The result as JSON."""
    head = {"schema": "delo-llava/leak/1", "sequence": sequence.name, "template": sequence.template}
    return {**head, "views": [asdict(leak) for leak in found]}


def leak_table(found: Sequence[Leak]) -> Table:
    """A column for each view, a row for each task, with the words that tell it most."""
    table = Table(title="test records whose words alone tell the task, %", title_justify="left")
    table.add_column("task")
    for leak in found:
        table.add_column(leak.view, justify="right")
    table.add_column("telling words of the instruction")
    for task in found[0].right:
        telling = ", ".join(found[0].telling[task])
        table.add_row(task, *(f"{leak.right[task]:.1f}" for leak in found), telling)
    table.add_section()
    table.add_row("mean", *(f"{leak.mean:.1f}" for leak in found))
    table.add_row("chance", *(f"{leak.chance:.1f}" for leak in found))
    return table
