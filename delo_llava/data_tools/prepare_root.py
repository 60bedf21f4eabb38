"""Data roots made of another one: a sub-sample of its training files, or links under other known names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delo_llava.data.entries import read_entries
from delo_llava.data.readers import read_records
from delo_llava.data.rows import IMAGE_PLACEHOLDER
from delo_llava.data_tools.prepared import Preparation
from delo_llava.errors import DeloError
from delo_llava.tasks import TaskSequence, TaskSpec

#: Names that one file has in different publications of the same data (CoIN: val.json, CoIN-ASD: test.json).
ALIASES = ("val.json", "test.json")


def sub_sample(sequence: TaskSequence, root: Path, made: Preparation, sub: float, seed: int) -> bool:
    """A data root with a share of every task's training records; everything else is linked.

    The records are those that `--data.sub` of a run with this seed would take, under the same ids.

    Raises:
        DeloError: a training file outside `root`, or one in a layout that cannot be cut.
    """
    files = {made.source(task.files["train"]): task for task in sequence.tasks}
    if made.is_done():
        return False
    for file, task in files.items():
        _require_cuttable(task, file, root)
        chosen = set(read_records(task, "train", sub, seed).ids)
        count = made.write_entries(made.target / file.relative_to(root), _chosen(task, file, chosen))
        made.counts[task.name] = count
    _mirror(root, made.target, set(files), made)
    made.notes.append(f"{sub} of the training records, drawn by the sha256 of seed, task, split and id.")
    return made.publish()


def _require_cuttable(task: TaskSpec, file: Path, root: Path) -> None:
    if not file.is_relative_to(root):
        raise DeloError("This training file is not below --from.", given=file)
    if file.suffix == ".parquet" or task.classes is not None:
        raise DeloError(
            "Sub-samples are written of JSON conversations only.", given=file, fix="train with --data.sub"
        )


def _chosen(task: TaskSpec, file: Path, chosen: set[str]) -> Iterator[dict[str, Any]]:
    """The entries of the chosen records, every turn an entry of its own under its record's id."""
    ids = iter(read_records(task, "train").ids)
    for entry in read_entries(file):
        turns = entry.get("conversations")
        pairs = 1 if turns is None else len(turns) // 2
        for turn in range(pairs):
            if (name := next(ids)) not in chosen:
                continue
            key = "question_id" if turns is None and "id" not in entry else "id"
            kept = entry if str(entry.get(key)) == name else {**entry, key: name}
            if pairs > 1:
                kept = {**kept, "conversations": turns[2 * turn : 2 * turn + 2]}
            yield _with_placeholder(kept) if turn else kept


def _with_placeholder(entry: dict[str, Any]) -> dict[str, Any]:
    """A later turn of a conversation on its own: it shows the image that the first one showed."""
    asked, answered = entry["conversations"]
    if not entry.get("image") or IMAGE_PLACEHOLDER in asked["value"]:
        return entry
    shown = {**asked, "value": f"{IMAGE_PLACEHOLDER}\n{asked['value']}"}
    return {**entry, "conversations": [shown, answered]}


def _mirror(source: Path, target: Path, written: set[Path], made: Preparation) -> None:
    """Link what is not written anew; folders on the way to what is are made."""
    for path in sorted(source.iterdir()):
        if path in written:
            continue
        if any(file.is_relative_to(path) for file in written):
            _mirror(path, target / path.name, written, made)
        else:
            made.link(target / path.name, path)


def aliases(source: Path, made: Preparation) -> bool:
    """Below `target`, every folder of `source` that has val.json or test.json, with both names as links.

    With the target equal to the source only the missing names are added.

    Raises:
        DeloError: there is no such file.
    """
    found = sorted({path.parent for name in ALIASES for path in source.rglob(name)})
    if not found:
        raise DeloError("No folder holds one of these files.", given=source, allowed=ALIASES)
    made.notes += [
        f"{folder.relative_to(source)}: both names are there already"
        for folder in found
        if all((folder / name).is_file() for name in ALIASES)
    ]
    made.counts["links"] = 0
    for folder in found:
        there = [folder / name for name in ALIASES if (folder / name).is_file()]
        place = made.target / folder.relative_to(source)
        for name in ALIASES:
            origin = folder / name if (folder / name).is_file() else there[0]
            if place / name != origin:
                made.link(place / name, origin)
                made.counts["links"] += 1
        for other in sorted(folder.glob("*.json")):
            if place / other.name != other and other.name not in ALIASES:
                made.link(place / other.name, other)
    return made.publish()
