"""One error type for everything a user can get wrong: what was given, what is allowed, how to fix it."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

#: Characters that a terminal acts on (but line ends and tabs), or that turn the direction of the text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class DeloError(Exception):
    """A mistake in input, configuration or environment, told so that it can be fixed.

    Args:
        message: what is wrong, in one sentence.
        given: the offending value.
        allowed: the values that would have been accepted; the closest one is suggested.
        fix: the command or edit that puts it right.
        everywhere: every rank raises this error, or one that tells of it, so one of them may tell it.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        given: object = None,
        allowed: Iterable[object] | None = None,
        fix: str | None = None,
        everywhere: bool = False,
    ) -> None:
        self.message, self.given, self.fix, self.everywhere = message, given, fix, everywhere
        self.allowed = [str(a) for a in allowed] if allowed is not None else None
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: one line each for the fault, the choice and the remedy."""
        lines = [self.message]
        if self.given is not None:
            lines.append(f"  given:   {self.given}")
        if self.allowed is not None:
            close = closest(str(self.given), self.allowed)
            lines.append(
                f"  allowed: {', '.join(self.allowed) or '(none)'}"
                + (f"  (did you mean {close}?)" if close else "")
            )
        if self.fix:
            lines.append(f"  fix:     {self.fix}")
        return "\n".join(lines)


def closest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed word most like `given`, or None when nothing is near."""
    return next(iter(get_close_matches(given, list(allowed), n=1, cutoff=0.5)), None)


def printable(text: str) -> str:
    """`text` with control characters written out: ids and answers come from data and model, and may hold
    sequences that a terminal obeys."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
