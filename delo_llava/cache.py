"""Where this project keeps what it made itself: built data, rows and embedded pictures, checks of images."""

import os
from pathlib import Path

from delo_llava.errors import DeloError

#: Environment variable with the cache's folder.
CACHE_ENV = "DELO_LLAVA_CACHE"


def cache_root() -> Path:
    """The cache's folder: $DELO_LLAVA_CACHE, else ~/.cache/delo_llava. It need not exist.

    Raises:
        DeloError: the variable is not set and this user has no home folder.
    """
    if given := os.environ.get(CACHE_ENV):
        return Path(given)
    try:
        return Path.home() / ".cache" / "delo_llava"
    except RuntimeError as error:
        raise DeloError(
            "The cache has no place: this user has no home folder.",
            fix=f"set ${CACHE_ENV} to a folder that can be written",
        ) from error


def writable(folder: Path) -> Path:
    """A folder of the cache, made with its parents when it is not there.

    Raises:
        DeloError: it cannot be made or cannot be written to.
    """
    reason = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    if reason is None and os.access(folder, os.W_OK | os.X_OK):
        return folder
    raise DeloError(
        f"The cache cannot be written: {reason or 'no right to write'}.",
        given=folder,
        fix=f"set ${CACHE_ENV} to a folder that can be written",
    )
