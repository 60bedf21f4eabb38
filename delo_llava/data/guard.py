"""JSON read through a guard: ijson keeps every name on the way to a value, and crashes on long numbers."""

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from delo_llava.errors import DeloError

#: Arrays and objects within each other; records of the known benchmarks have at most 6.
MAX_DEPTH = 64

#: Bytes of one text. A string is whole in memory before it can be looked at.
MAX_TEXT = 64 * 1024 * 1024

#: Digits of one number; Python refuses longer ones, upon which ijson's C parser ends the process.
MAX_DIGITS = 4000

_LONG = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_LAST_DIGITS = re.compile(rb"[0-9]*\Z")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class GuardedJson:
    """The `read` of a JSON file that refuses depth, texts and numbers beyond what a data file needs.

    Args:
        file: open at the beginning of its value.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._inside, self._text, self._depth = False, 0, 0
        self._escape = self._digits = b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes.

        Raises:
            DeloError: what they hold is refused.
        """
        data = self._file.read(size)
        self._look_at(self._outside_of_texts(data))
        return data

    def _outside_of_texts(self, data: bytes) -> bytes:
        """The bytes that belong to no text, which are kept apart; escapes are of no interest."""
        data = (self._escape + data).replace(rb"\\", b"")
        self._escape = b"\\" if data.endswith(b"\\") else b""
        parts = data.replace(rb"\"", b"").split(b'"')
        self._text = len(parts[-1]) + (self._text if len(parts) == 1 else 0)
        outside = b'"'.join(parts[self._inside :: 2])
        self._inside ^= len(parts) % 2 == 0
        if self._inside and self._text > MAX_TEXT:
            raise self._refused(f"a text of more than {MAX_TEXT} bytes")
        return outside

    def _look_at(self, outside: bytes) -> None:
        outside = self._digits + outside
        self._digits = b"" if self._inside else _LAST_DIGITS.search(outside)[0]  # type: ignore[index]
        if _LONG.search(outside):
            raise self._refused(f"a number of more than {MAX_DIGITS} digits")
        brackets = np.frombuffer(outside.translate(None, _NO_BRACKETS), np.uint8)
        if len(brackets):
            depth = self._depth + np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1).cumsum()
            if depth.max() > MAX_DEPTH:
                raise self._refused(f"more than {MAX_DEPTH} arrays and objects within each other")
            self._depth = int(depth[-1])

    def _refused(self, what: str) -> DeloError:
        return DeloError(f"This file is refused: it holds {what}.", given=self._path, fix="fetch it again")
