"""Decoding images in worker processes; this module imports Pillow alone, so that workers start fast."""

import hashlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from delo_llava.data.images import MAX_BYTES, BadImage, ImageTooLarge, absent, decode
from delo_llava.errors import DeloError

#: Images for one call of a worker; so many calls per worker wait at most.
CHUNK, AHEAD = 32, 3

#: With fewer images, starting workers costs more than it saves.
WORTH_WORKERS = 256

#: Part of every remembered verdict: a change of what is checked here must change it.
VERSION = 2

#: A picture whose brightest pixel is below this is told: some store 10 or 12 bits in 16.
DARK = 40


@dataclass(frozen=True, slots=True)
class Verdict:
    """What decoding one file told.

    Attributes:
        path: absolute.
        size, mtime_ns: of the file that was read; -1 where there is none.
        sha256: of its bytes; empty when it was not read.
        width, height: pixels; 0 where unknown.
        code: of the fault or note, or "".
        reason: of it, in words.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""
    width: int = 0
    height: int = 0
    code: str = ""
    reason: str = ""


def judge(path: str) -> Verdict:
    """Read, hash and decode one image file."""
    try:
        status = os.stat(path)
        if not os.path.isfile(path):
            return Verdict(path, -1, -1, code="image_missing", reason=f"{path} is no file")
        if status.st_size > MAX_BYTES:
            reason = f"{path}: {status.st_size} bytes are more than {MAX_BYTES}"
            return Verdict(path, status.st_size, status.st_mtime_ns, code="image_too_large", reason=reason)
        content = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Verdict(path, -1, -1, code="image_missing", reason=f"{path}: {absent(Path(path))}")
    except (OSError, ValueError) as error:  # no rights, a loop of links, a name with a null byte
        return Verdict(path, -1, -1, code="image_undecodable", reason=f"{path} cannot be read: {error}")
    digest = hashlib.sha256(content).hexdigest()
    try:
        picture = decode(io.BytesIO(content))
    except BadImage as error:
        code = "image_too_large" if isinstance(error, ImageTooLarge) else "image_undecodable"
        reason = f"{path}: {error}"
        return Verdict(path, status.st_size, status.st_mtime_ns, digest, code=code, reason=reason)
    brightest = max(high for _, high in picture.getextrema())  # type: ignore[misc]
    code = "image_dark" if brightest < DARK else ""
    reason = f"{path}: its brightest pixel is {brightest} of 255" if code else ""
    return Verdict(path, status.st_size, status.st_mtime_ns, digest, *picture.size, code, reason)


def judge_all(paths: Sequence[str], workers: int) -> Iterator[list[Verdict]]:
    """Verdicts of many files, some at a time, in no particular order; memory does not grow with their number.

    Args:
        workers: processes; few files are decoded in this one.

    Raises:
        DeloError: the system ended a worker.
    """
    chunks = (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))
    if workers <= 1 or len(paths) < WORTH_WORKERS:
        yield from (_judge_chunk(chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        waiting: set[Future[list[Verdict]]] = set()
        try:
            for chunk in chunks:
                waiting.add(pool.submit(_judge_chunk, chunk))
                if len(waiting) >= AHEAD * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in waiting:
                yield future.result()
        except BrokenProcessPool as error:
            raise DeloError(
                "The system ended a process that decoded images: too little memory, or a fault in a decoder.",
                fix="the same command goes on from here; with --workers 1 it needs the least memory",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave when the check was killed: a worker would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _judge_chunk(paths: Sequence[str]) -> list[Verdict]:
    return [judge(path) for path in paths]
