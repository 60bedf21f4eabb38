"""Data roots made of another one: a sub-sample of its training files, or links under other known names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delo_llava.data.entries import read_entries
from delo_llava.data.layouts import IMAGE_PLACEHOLDER, SAYING
from delo_llava.data.readers import open_reading, read_records
from delo_llava.data.rows import Row
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
    if file.suffix.lower() == ".parquet" or task.classes is not None:
        raise DeloError(
            "Sub-samples are written of JSON conversations only.", given=file, fix="train with --data.sub"
        )


def _chosen(task: TaskSpec, file: Path, chosen: set[str]) -> Iterator[dict[str, Any]]:
    """The entries of the chosen records; of one with several turns, every turn as an entry of its own."""
    for given, entry in zip(read_entries(file), open_reading(task, "train"), strict=True):
        for row in entry.rows:
            if row["id"] in chosen:
                yield _alone(given, row) if len(entry.rows) > 1 else _named(given, row["id"])


def _named(given: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry under the id of its record, which differs where ids repeat."""
    key = "question_id" if "question_id" in given and "id" not in given else "id"
    return given if str(given.get(key)) == name else {**given, key: name}


def _alone(given: dict[str, Any], row: Row) -> dict[str, Any]:
    """One turn of a conversation as an entry; it shows the image that the first one showed."""
    shown = f"{IMAGE_PLACEHOLDER}\n" if row["image"] else ""
    talk = (("human", f"{shown}{row['instruction']}"), ("gpt", row["answer"]))
    kept = {key: value for key, value in given.items() if key not in SAYING}
    turns = [{"from": who, "value": text} for who, text in talk]
    return {**kept, "id": row["id"], "conversations": turns}


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
