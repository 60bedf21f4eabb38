"""What a scorer is: an id with a version, and a number in [0, 1] for one prediction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from delo_llava.errors import DeloError
from delo_llava.tasks import AS_WRITTEN, Record

#: `native`: the right rule. `compat`: what the benchmark's official script does, quirk by quirk.
Scoring = Literal["native", "compat"]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a prediction is judged against.

    Attributes:
        id: of the question.
        answer: the reference answer as it is written.
        instruction: what was asked.
        extra: what else the data says (`Record.extra`): several answers, a box, an image's size.
        task: name of the task, for rules that differ between tasks.
        image: name of the image file without folders, for rules that read the data set from it.
    """

    id: str
    answer: str
    instruction: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    image: str = ""

    @classmethod
    def of(cls, record: Record) -> "Reference":
        """The reference of a record; its answer keeps its blanks, which some official rules compare."""
        image = record.image.name if record.image else ""
        answer = record.extra.get(AS_WRITTEN, record.answer)
        return cls(record.id, answer, record.instruction, record.extra, record.task, image)


def strings_of(reference: Reference, *keys: str) -> list[str]:
    """The list of texts in `extra` under the first key that is there, else the one reference answer.

    Items may be objects with an `answer`, as the VQA files have them.
    """
    given = next((found for key in keys if (found := reference.extra.get(key))), None)
    if not given:
        return [reference.answer]
    if isinstance(given, str):
        return [given]
    return [str(item["answer"]) if isinstance(item, dict) else str(item) for item in given]


@dataclass(frozen=True)
class Scorer:
    """Judges predictions against their references; a task's score is 100 × `total`.

    Attributes:
        id: name and version; results are comparable only where ids are equal.
        rule: what counts as right, in one sentence.
        function: (prediction, reference) -> this record's score, in [0, 1].
        corpus: (predictions, references, in the order of the file) -> the task's score, for rules that are no
            mean over records (macro-F1, CIDEr, pairing by position); None means the mean of `function`.
        compat: the rule of the benchmark's official script, where there is one.
        needs: keys of `Reference.extra` that every record must have.
        resamples: how often `corpus` is called for a cell's standard error; 0 gives none, for slow rules.
        details: (predictions, references) -> further named numbers of the whole task, as shares.
        unanswered: what a question without prediction counts where missing ones are allowed: the script of
            a compat rule may leave them out of the denominator.
        ready: further conditions: raises `DeloError` where the rule cannot be applied to the references,
            or on this machine.
        by_position: the rule pairs the n-th prediction of a file with the n-th reference, whatever the ids.
        counts: whether a question counts at all; without it every one does.
        text_ids: its script looks answers up by ids as text and never finds one whose id is a number.
        says: what a right answer says, where that is not the reference as it is written.
        several: keys of `Reference.extra` that hold answers of which any may be right; the first that is
            there counts.
        reads_prompt: its script reads the question from the prompt beside an answer, not from the annotation.
    """

    id: str
    rule: str
    function: Callable[[str, Reference], float]
    corpus: Callable[[Sequence[str], Sequence[Reference]], float] | None = None
    compat: "Scorer | None" = None
    needs: tuple[str, ...] = ()
    resamples: int = 100
    details: Callable[[Sequence[str], Sequence[Reference]], dict[str, float]] | None = None
    unanswered: Literal["wrong", "skipped"] = "wrong"
    by_position: bool = False
    ready: Callable[[Sequence[Reference]], None] | None = None
    counts: Callable[[Reference], bool] | None = None
    says: Callable[[Reference], str] | None = None
    several: tuple[str, ...] = ()
    text_ids: bool = False
    reads_prompt: bool = False

    def __call__(self, prediction: str, reference: Reference) -> float:
        """The score of one prediction in [0, 1]."""
        return self.function(prediction, reference)

    def total(self, predictions: Sequence[str], references: Sequence[Reference]) -> float:
        """The score of a whole task, as a share (a caption metric may exceed 1)."""
        if self.corpus is not None:
            return self.corpus(predictions, references)
        pairs = zip(predictions, references, strict=True)
        return sum(self.function(text, reference) for text, reference in pairs) / len(predictions)

    def is_counted(self, reference: Reference) -> bool:
        """Whether a question counts by this rule."""
        return self.counts is None or self.counts(reference)

    def right_answer(self, reference: Reference) -> str:
        """What a right answer says."""
        return reference.answer if self.says is None else self.says(reference)

    def accepted(self, record: Record) -> list[str]:
        """The texts of which each would be right, or partly right, as the answer to a record; never none.

        Raises:
            DeloError: its reference has not the form that the rule needs.
        """
        reference = Reference.of(record)
        given = strings_of(reference, *self.several) if self.several else [self.right_answer(reference)]
        return [text for text in dict.fromkeys(given) if text.strip()] or [self.right_answer(reference)]

    def in_mode(self, scoring: Scoring) -> "Scorer":
        """This scorer, or the official script's rule.

        Raises:
            DeloError: `compat` is asked for and no official script is known.
        """
        if scoring == "native":
            return self
        if self.compat is None:
            raise DeloError(
                f"The scorer {self.id} has no official script to be compatible with.",
                given="compat",
                allowed=["native"],
                fix="use --eval.scoring native",
            )
        return self.compat

    def unusable(self, records: Sequence[Record]) -> tuple[list[int], str]:
        """The numbers of records that the rule cannot be applied to or does not count, and a sentence on all
        of them.

        Raises:
            DeloError: the rule cannot be applied at all on this machine.
        """
        self.check(())
        references = [Reference.of(record) for record in records]
        uncounted = [number for number, each in enumerate(references) if not self.is_counted(each)]
        told = f"{len(uncounted)} of {len(references)} questions do not count by {self.id}."
        try:
            self.check(references)
        except DeloError as error:
            bad = [number for number, each in enumerate(references) if self._refuses(each)]
            return sorted({*bad, *uncounted}), error.message
        return uncounted, told

    def _refuses(self, reference: Reference) -> bool:
        try:
            self.check([reference])
        except DeloError:
            return True
        return False

    def check(self, references: Sequence[Reference]) -> None:
        """Make sure that the rule can be applied, on this machine and to these references.

        Raises:
            DeloError: a program is missing, or a key of `needs` is lacking somewhere.
        """
        if self.ready is not None:
            self.ready(references)
        for key in self.needs:
            lacking = [reference.id for reference in references if not reference.extra.get(key)]
            if lacking:
                raise DeloError(
                    f"The scorer {self.id} needs `{key}` of every record, and "
                    f"{len(lacking)} of {len(references)} have none.",
                    given=", ".join(lacking[:5]) + (" …" if len(lacking) > 5 else ""),
                    fix="use a file of references that has it, or another scorer",
                )
