"""Step checkpoints of one stage on disk: `step-000123/` folders, each published in one rename; the newest
valid one is found again."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from delo_llava.errors import DeloError
from delo_llava.files import fsync
from delo_llava.runs.manifest import manifest_faults, write_manifest

NAME = "step-{:06d}"
_PUBLISHED = re.compile(r"step-(\d{6,})")
#: Prefixes of what is not (or no longer) a checkpoint: half written, or about to be deleted.
DRAFT, TRASH = ".draft-", ".trash-"


class StepStore:
    """The step checkpoints of one stage.

    Args:
        folder: `<run>/checkpoints/<task>`; made when the first checkpoint is.
        keep: how many published ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def published(self) -> list[tuple[int, Path]]:
        """(step, folder) of every published checkpoint, valid or not, newest first."""
        found = (_PUBLISHED.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(((int(m[1]), self.folder / m[0]) for m in found if m), reverse=True)

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are those of its manifest, and what is wrong with newer ones."""
        faults: list[str] = []
        for _, path in self.published():
            found = manifest_faults(path)
            if not found:
                return path, faults
            faults += found
        return None, faults

    def draft(self, step: int, launch: str) -> Path:
        """Where the ranks write their files of a checkpoint; `launch` keeps a dying launch's ranks out."""
        return self.folder / f"{DRAFT}{NAME.format(step)}-{launch}"

    def publish(self, draft: Path, step: int) -> Path:
        """Make `draft` the newest checkpoint and delete those beyond `keep`. A bad one of that step is put
        aside under the name `….bad`.

        Raises:
            DeloError: the disk does not take it; older checkpoints stay as they are.
        """
        target = self.folder / NAME.format(step)
        with told_if_refused(self.folder):
            write_manifest(draft)
            fsync(draft)
            if target.exists():
                aside = target.with_name(f"{target.name}.bad")
                _delete(aside)
                target.replace(aside)
            draft.replace(target)
            fsync(self.folder)
            # Newer ones are there only if they are bad, and must not push a good one out.
            upto = [path for found, path in self.published() if found <= step]
            for path in upto[self.keep :]:
                _delete(path)
        return target

    def clear(self) -> None:
        """Remove what killed launches left half written or half deleted."""
        with told_if_refused(self.folder):
            for path in (*self.folder.glob(f"{DRAFT}*"), *self.folder.glob(f"{TRASH}*")):
                shutil.rmtree(path)

    def discard(self) -> None:
        """Delete all checkpoints, and what a kill left of deleting them: the stage's adapter is published."""
        _delete(self.folder)


@contextmanager
def told_if_refused(folder: Path) -> Iterator[None]:
    """Tell a full disk or missing rights as an error with a remedy.

    Raises:
        DeloError: the block raised an OSError, or safetensors' own for a failed write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        near = next(path for path in (folder, *folder.parents) if path.exists())
        raise DeloError(
            f"The checkpoint cannot be written: {error}",
            given=f"{folder} ({shutil.disk_usage(near).free >> 20} MiB free)",
            fix="make room or rights there; the same command goes on from the last good checkpoint",
        ) from error


def _delete(path: Path) -> None:
    """Delete a folder so that a kill half way leaves nothing that looks like a checkpoint."""
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    if path.exists():
        path.replace(trash)
        shutil.rmtree(trash)
