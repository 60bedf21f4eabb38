"""Trying records as training would: every prompt is tokenised, and what would be trained is counted."""

from collections.abc import Callable, Sequence

from delo_llava.data.faults import in_a_line
from delo_llava.data.tokens import Row, beyond_reach
from delo_llava.data_tools.prompts import Prompts
from delo_llava.errors import DeloError
from delo_llava.tasks import Record

#: Records that are tokenised at a time.
BATCH = 64

#: Tells a fault of an entry: (code, entry, record, message).
Tell = Callable[[str, int, str, str], None]

#: (entry, record, size of its image).
Waiting = tuple[int, Record, tuple[int, int] | None]


class Trial:
    """Tokenises the records of one (task, split).

    Args:
        size: width and height of an image by its path, None where it cannot be used.
        accepted: the texts that would be right as the answer to a record.
        room: most tokens of an answer of the task's.
        tell: is told every fault.

    Attributes:
        trained: tokens that would be trained.
        cut: records whose `context`, `instruction` or `answer` was cut.
        long: records of which every right answer is longer than `room`.
        first_cut, first_long: (entry, record) of the first of them.
    """

    def __init__(
        self,
        prompts: Prompts,
        size: Callable[[str], tuple[int, int] | None],
        accepted: Callable[[Record], list[str]],
        room: int,
        tell: Tell,
    ) -> None:
        self.prompts, self._size, self._accepted = prompts, size, accepted
        self.room, self._tell = room, tell
        self.long = 0
        self.first_cut: tuple[int, str] | None = None
        self.first_long: tuple[int, str] | None = None
        self.trained = 0
        self.cut = dict.fromkeys(("context", "instruction", "answer"), 0)
        self._waiting: list[Waiting] = []

    def add(self, entry: int, record: Record) -> None:
        """Try one more record; one whose image cannot be used is left out."""
        size = None if record.image is None else self._size(str(record.image))
        if record.image is None or size is not None:
            self._waiting.append((entry, record, size))
        if len(self._waiting) == BATCH:
            self.finish()

    def finish(self) -> None:
        """Try what still waits."""
        waiting, self._waiting = self._waiting, []
        self._measure(waiting)
        try:
            rows = self._rows(waiting)
        except DeloError:
            for one in waiting:
                self._single(*one)
            return
        for (entry, record, _), row in zip(waiting, rows, strict=True):
            self._judge(entry, record, row)

    def _measure(self, waiting: Sequence[Waiting]) -> None:
        """Count records of which no right answer can be generated."""
        accepted = [self._accepted(record) for _, record, _ in waiting]
        dialogue = self.prompts.processor.dialogue
        long = beyond_reach(self.prompts.tokenizer, dialogue, accepted, self.room)
        for (entry, record, _), is_long in zip(waiting, long, strict=True):
            if is_long:
                self.long += 1
                self.first_long = self.first_long or (entry, record.id)

    def _rows(self, waiting: Sequence[Waiting]) -> list[Row]:
        """Tokenise."""
        if not waiting:
            return []
        return self.prompts.rows([record for _, record, _ in waiting], [size for *_, size in waiting])

    def _single(self, entry: int, record: Record, size: tuple[int, int] | None) -> None:
        """One record of a batch that was refused."""
        try:
            [row] = self._rows([(entry, record, size)])
        except DeloError as error:
            self._tell(self._code(record, error), entry, record.id, in_a_line(error))
        else:
            self._judge(entry, record, row)

    def _judge(self, entry: int, record: Record, row: Row) -> None:
        """Count what is cut and trained tokens; the end token and blanks alone teach nothing."""
        for part in row.cut:
            self.cut[part] += 1
            self.first_cut = self.first_cut or (entry, record.id)
        trained = [token for token, is_trained in zip(row.ids, row.trained, strict=True) if is_trained]
        self.trained += len(trained)
        if record.split != "train":
            return
        if not self.prompts.tokenizer.decode(trained, skip_special_tokens=True).strip():
            told = f"nothing of the answer {record.answer!r} is left but special tokens"
            self._tell("label_empty", entry, record.id, told)

    def _code(self, record: Record, error: DeloError) -> str:
        """What a refusal of the collator is called."""
        token = self.prompts.backbone.image_token
        if any(token in text for text in (record.context or "", record.instruction, record.answer)):
            return "placeholder_in_text"
        return "too_long" if "does not fit" in error.message else "prompt_refused"
