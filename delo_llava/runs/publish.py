"""Publishing a folder in one step: it is there whole, with a manifest of its files' hashes, or not at all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from delo_llava.errors import DeloError
from delo_llava.files import fsync
from delo_llava.runs.manifest import manifest_faults, write_manifest

RESTORE = "put the published files back, or remove this folder to make it again"


@contextmanager
def published(target: Path, what: str, check: Callable[[Path], None], fix: str) -> Iterator[Path]:
    """A draft folder that becomes `target` in one step, or vanishes if the block fails.

    The files are checked before, and every file's hash after the rename.

    Args:
        what: names the folder's content in messages, as `The adapter of task0`.
        check: looks at the draft before it is published, and raises.
        fix: what helps if the disk does not take it.

    Raises:
        DeloError: what `check` finds, or the disk does not take the files.
    """
    draft = target.parent / f".draft-{target.name}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        check(draft)
        write_manifest(draft)
        for folder in [draft, *(p for p in draft.rglob("*") if p.is_dir())]:
            fsync(folder)
        draft.replace(target)
    except (OSError, SafetensorError) as error:
        room = shutil.disk_usage(_existing(target)).free >> 20
        raise DeloError(
            f"{what} cannot be written: {error}", given=f"{target} ({room} MiB free)", fix=fix
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    fsync(target.parent)
    verify(target)


def verify(folder: Path) -> Path:
    """`folder`, if its files are those of its manifest.

    Raises:
        DeloError: naming each file that is missing, foreign or different.
    """
    faults = manifest_faults(folder)
    if faults:
        raise DeloError(
            f"A published folder is not what was written: {'; '.join(faults)}", given=folder, fix=RESTORE
        )
    return folder


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(p for p in path.absolute().parents if p.is_dir())
