"""What can be wrong with a data file: faults that the reader collects for a check and raises in training."""

from collections.abc import Callable, Iterable
from typing import NoReturn

from delo_llava.errors import DeloError

#: Code -> what it means: everything for which the reader refuses a file.
READING: dict[str, str] = {
    "file_unreadable": "an annotation file or one of its side files cannot be read to its end",
    "entry_malformed": "an entry has not the form that its layout asks for",
    "instruction_empty": "an instruction is absent, empty or no text",
    "answer_empty": "a reference answer is absent or empty",
    "placeholder_without_image": "the text has the image placeholder, but the entry names no image",
    "placeholder_surplus": "a text has more image placeholders than the entry has images",
    "keys_compete": "two keys of an entry say different things of one field",
    "image_key": "an entry has no image under a key that is read, but something like one under another",
    "image_outside": "an image path leaves the image folder",
    "label_form": "a label of the CMML layout is no class, list of classes or 0/1 vector",
}


class BadEntry(DeloError):
    """A fault of one entry; the entries around it can be read.

    Args:
        code: a key of `READING`, or of the check's further codes.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        given: object = None,
        allowed: Iterable[object] | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message, given=given, allowed=allowed, fix=fix)
        self.code = code

    def at(self, where: str) -> DeloError:
        """The same, told with its place, as what stops a reader."""
        return DeloError(f"{where}: {self.message}", given=self.given, allowed=self.allowed, fix=self.fix)


class Faults(list[BadEntry]):
    """The faults of one entry. `with faults:` collects one of the block and goes on behind it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, BadEntry):
            self.append(error)
            return True
        return False


#: Is told a fault of a file as a whole.
Tell = Callable[[DeloError], None]


def stop(error: DeloError) -> NoReturn:
    """The strict way to be told a fault.

    Raises:
        DeloError: the fault.
    """
    raise error


def in_a_line(error: DeloError) -> str:
    """A fault's message with what was given."""
    return error.message if error.given is None else f"{error.message} ({error.given})"


def short(value: object) -> str:
    """A value for a message."""
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
