"""A run's folder: layout, atomic publishing of adapters, proof that published ones never change."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delo_llava.errors import DeloError
from delo_llava.files import remove_drafts, sha256_file, write_json_atomic, write_text_atomic
from delo_llava.runs.manifest import MANIFEST
from delo_llava.runs.publish import RESTORE, published, verify
from delo_llava.strict import read_json, read_tensors

#: Parts of names of tensors that start at zero: if all of them are still zero, nothing was trained.
ZERO_AT_START = ("lora_B", "delo_B", "lowrank_B")
#: Which base an adapter belongs to; it lies beside its tensors, as adapters are copied about.
BASE = "base.json"


class RunStore:
    """A run's folder.

    `config.yaml` (resolved configuration) · `run.json` (versions, hashes, seeds, stages) · `adapters/<task>/`
    · `checkpoints/<task>/step-…/` (of the stage that is being trained) · `predictions/` ·
    `logs/metrics.jsonl` · `results.json` · `report.html` · `complete.json` (the last stage is evaluated).
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.run = self.root / "run.json"
        self.adapters = self.root / "adapters"
        self.predictions = self.root / "predictions"
        self.logs = self.root / "logs"
        self.metrics = self.logs / "metrics.jsonl"
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.complete = self.root / "complete.json"

    def adapter(self, task: str) -> Path:
        """Where the adapter published after `task` lies."""
        return self.adapters / task

    def step_checkpoints(self, task: str) -> Path:
        """Where the step checkpoints lie while `task` is being trained."""
        return self.root / "checkpoints" / task

    def begun(self, task: str) -> bool:
        """Whether anything of a stage was trained: it is published, or has a checkpoint."""
        return self.adapter(task).exists() or any(self.step_checkpoints(task).glob("step-*"))

    def forget_results(self) -> None:
        """Remove what evaluations wrote (answers can be given again)."""
        for folder in ("predictions", "answers", "routing", "eval-general"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
        for file in (self.results, self.complete):
            file.unlink(missing_ok=True)

    def begin(self, config: str, run: dict[str, Any]) -> None:
        """Write the resolved configuration and the run's record; nothing is left of an interrupted launch."""
        self.create()
        write_text_atomic(self.config, config)
        write_json_atomic(self.run, run)

    def create(self) -> None:
        """Make the folders and clear what an interrupted publishing or writing left."""
        for folder in (self.adapters, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        for draft in self.adapters.glob(".draft-*"):
            shutil.rmtree(draft)
        remove_drafts(self.root)

    # ---- run.json ----
    def read_run(self) -> dict[str, Any]:
        """The content of run.json, empty for a new run.

        Raises:
            DeloError: the file is no JSON object.
        """
        if not self.run.is_file():
            return {}
        return read_json(self.run, "run.json", fix="put it back, or start with another --output")

    def update_run(self, **entries: Any) -> None:
        """Replace top-level entries of run.json."""
        write_json_atomic(self.run, {**self.read_run(), **entries})

    def update_stage(self, task: str, **entries: Any) -> None:
        """Add to what run.json says of one task's stage."""
        stages = self.read_run().get("stages", {})
        stages[task] = {**stages.get(task, {}), **entries}
        self.update_run(stages=stages)

    def stage(self, task: str) -> dict[str, Any]:
        """What run.json says of one task's stage (empty before it is trained)."""
        entry: dict[str, Any] = self.read_run().get("stages", {}).get(task, {})
        return entry

    def write_config(self, text: str) -> None:
        """Store the resolved configuration."""
        write_text_atomic(self.config, text)

    # ---- adapters ----
    @contextmanager
    def publish(self, task: str) -> Iterator[Path]:
        """A draft folder that becomes `adapters/<task>` in one step, or vanishes if the block fails.

        The tensors are checked before, and every file's hash after the rename.

        Raises:
            DeloError: an adapter of that name exists, the tensors are empty, unchanged or not finite, or the
                disk does not take them.
        """
        target = self.adapter(task)
        if target.exists():
            raise DeloError("This adapter is already published and is never rewritten", given=target)
        fix = "make room or rights there; the same command goes on where it was"
        with published(target, f"The adapter of {task}", check_tensors, fix) as draft:
            yield draft
            if carried := self._base():
                write_json_atomic(draft / BASE, carried)
        self.update_stage(task, manifest=sha256_file(target / MANIFEST))

    def finished(self, task: str) -> bool:
        """Whether `task` has a published adapter; one rename publishes, so what exists was complete once.

        Raises:
            DeloError: it has one, and a file of it is missing or differs.
        """
        return self.adapter(task).exists() and bool(verify(self.adapter(task)))

    def verify_published(self, tasks: Iterable[str]) -> None:
        """Check that the adapters of `tasks` are byte for byte what was published.

        Raises:
            DeloError: naming each file that changed, a folder that was rewritten together with its
                manifest, or one that was trained over another base.
        """
        for task in tasks:
            folder = verify(self.adapter(task))
            self._require_base(folder)
            recorded = self.stage(task).get("manifest")
            if recorded is not None and recorded != sha256_file(folder / MANIFEST):
                raise DeloError("An adapter was rewritten after it was published", given=folder, fix=RESTORE)

    def _base(self) -> dict[str, Any]:
        """What tells the run's base from another one: sha256 of its weights, or the revision of a hub id."""
        base = self.read_run().get("base", {})
        known = {key: base[key] for key in ("sha256", "revision") if base.get(key)}
        return {"name": Path(base.get("path", "")).name, **known} if known else {}

    def _require_base(self, folder: Path) -> None:
        if not (folder / BASE).is_file():
            return  # of a version that did not write it
        carried, base = read_json(folder / BASE, "What an adapter says of its base", RESTORE), self._base()
        for key in ("sha256", "revision"):
            if key in carried and key in base and carried[key] != base[key]:
                raise DeloError(
                    "An adapter was trained over another base than the run's",
                    given=f"{folder}: {carried.get('name')}, {key} {carried[key]}",
                    allowed=[f"{base['name']}, {key} {base[key]}"],
                    fix=RESTORE,
                )


def check_tensors(folder: Path) -> None:
    """Refuse adapters that hold nothing: no tensor, an empty or non-finite one, or every B matrix still zero.

    Raises:
        DeloError: naming the tensor.
    """
    start, moved, count = 0, 0, 0
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in read_tensors(file, "An adapter file").items():
            count += 1
            if tensor.numel() == 0:
                raise DeloError(f"An adapter tensor is empty: {name}", given=file.name, fix=_GATHER)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise DeloError(f"An adapter tensor is not finite: {name}", given=file.name, fix=_LOWER)
            if any(part in name for part in ZERO_AT_START):
                start, moved = start + 1, moved + int(bool(tensor.any()))
    if count == 0:
        raise DeloError("An adapter without any tensor was to be published", given=folder.name, fix=_GATHER)
    if start and not moved:
        raise DeloError(
            "Every B matrix of the adapter is still zero: nothing was trained", given=folder.name, fix=_GATHER
        )


_LOWER = "begin anew with a lower train.lr, in another --output"
_GATHER = "parameters must be gathered from all ranks and trained before they are saved"
