"""Reading JSON and tensors that others may have written: without loopholes, and told when damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from delo_llava.errors import DeloError

if TYPE_CHECKING:
    from torch import Tensor

#: How a file begins that stands for one that Git LFS has not fetched; none of them is larger.
POINTER, POINTER_BYTES = b"version https://git-lfs", 1024
#: What is said of one.
IS_POINTER, FETCH = "it is a pointer of Git LFS, not the file itself", "git lfs pull, or fetch it again"


def is_pointer(file: Path) -> bool:
    """Whether Git LFS has not fetched a file.

    Raises:
        OSError: it cannot be read.
    """
    if file.stat().st_size > POINTER_BYTES:
        return False
    with file.open("rb") as handle:
        return handle.read(len(POINTER)) == POINTER


def parse_json(text: str | bytes, number: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text; a key that repeats counts last, a byte order mark in front counts nothing.

    Args:
        number: makes numbers with a point or exponent of their writing; by default `float`.

    Raises:
        ValueError: not JSON, NaN or Infinity (which are no JSON), nested too deeply, or not UTF-8.
    """
    decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        return json.loads(decoded, parse_float=number, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, what: str, fix: str | None = None) -> dict[str, Any]:
    """The object in one of this project's own JSON files.

    Args:
        what: names the file in the message.

    Raises:
        DeloError: not a readable file, not JSON, or no object.
    """
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DeloError(f"{what} cannot be read: {error}", given=path, fix=fix) from error
    if not isinstance(content, dict):
        raise DeloError(f"{what} holds no object.", given=f"{path}: {type(content).__name__}", fix=fix)
    return content


def read_tensors(path: Path, what: str, fix: str | None = None) -> "dict[str, Tensor]":
    """The tensors in a safetensors file; nothing else is understood, so nothing of it can run.

    Raises:
        DeloError: not a readable file, or its header and length do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DeloError(f"{what} cannot be read: {error}", given=path, fix=fix) from error


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
