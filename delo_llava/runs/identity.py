"""What makes a run's numbers beside its code, hashed once: data and base, and how they differ from a run's.

Training refuses to go on with others, evaluation to put numbers of others among a run's own.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from delo_llava.files import HashCache, combined_hash
from delo_llava.runs.store import RunStore
from delo_llava.schema import flat
from delo_llava.tasks import TaskSequence

#: Files that decide what the network computes; what else decides an answer: tokenizer, processor, template.
WEIGHTS = ("*.safetensors", "*.bin", "config.json")
BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
#: Files of an encoder's folder that decide its features: weights, tokenizer, how images are prepared.
ENCODER_FILES = ("*.safetensors", "*.json", "merges.txt")
#: The splits that a task may have; its other files are those that are joined to them.
SPLITS = ("train", "val", "test")


def data_hashes(store: RunStore, sequence: TaskSequence, *, keep: bool = True) -> dict[str, dict[str, str]]:
    """sha256 of each task's files and side files, by task and name; unchanged files are not read again.

    Args:
        keep: remember what was computed (one rank only may).
    """
    cache = HashCache(store.logs / "hashes.json")
    hashes = {
        task.name: {
            **{str(split): cache.hash(path) for split, path in task.files.items()},
            **{name: cache.hash(path) for name, path in task.beside.items()},
        }
        for task in sequence.tasks
    }
    if keep:
        cache.save()
    return hashes


def base_facts(store: RunStore, model_path: str, *, keep: bool = True) -> dict[str, Any]:
    """Where the base came from, one sha256 over its weights and configuration, and one of each file beside
    them (tokenizer, processor, template); of a hub id that is no folder, the commit that its cache holds.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        return {"path": model_path, "sha256": None, "revision": _revision(model_path)}
    cache = HashCache(store.logs / "hashes.json")
    weights = {file for pattern in WEIGHTS for file in folder.glob(pattern)}
    beside = {file for pattern in BESIDE for file in folder.glob(pattern)} - weights
    found = {
        "path": model_path,
        "sha256": combined_hash(cache, weights),
        "files": {file.name: cache.hash(file) for file in sorted(beside)},
    }
    if keep:
        cache.save()
    return found


def encoder_files(folder: str) -> set[Path]:
    """The files that decide an encoder's features."""
    return {file for pattern in ENCODER_FILES for file in Path(folder).glob(pattern)}


def encoder_hashes(store: RunStore, folders: Iterable[str], *, keep: bool = True) -> dict[str, str]:
    """One sha256 over the files that decide an encoder's features, by its folder."""
    cache = HashCache(store.logs / "hashes.json")
    found = {folder: combined_hash(cache, encoder_files(folder)) for folder in folders}
    if keep:
        cache.save()
    return found


def base_differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """How a base differs from the recorded one, a line each; what an older run did not record is not
    compared.
    """
    lines = []
    for key, name in (("sha256", "weights"), ("revision", "revision")):
        if key in recorded and recorded[key] != found.get(key):
            lines.append(f"base {name}: the run has {recorded[key]}, {found['path']} is {found.get(key)}")
    files = found.get("files", {})
    for name, known in (recorded.get("files") or {}).items():
        if files.get(name) != known:
            lines.append(f"base {name}: the run has {known}, {found['path']} has {files.get(name)}")
    extra = sorted(set(files) - set(recorded.get("files") or files))
    return lines + [f"base {name}: the run has none, {found['path']} has {files[name]}" for name in extra]


def data_differences(
    recorded: Mapping[str, Mapping[str, str]],
    found: Mapping[str, Mapping[str, str]],
    tasks: Collection[str],
    splits: Collection[str] = SPLITS,
) -> list[str]:
    """How the files of some tasks differ from the recorded ones, a line each.

    Args:
        splits: those that count; files joined to them always do.
    """
    known, now = (
        flat({task: dict(files) for task, files in hashes.items() if task in tasks})
        for hashes in (recorded, found)
    )
    left_out = {f"{task}.{split}" for task in tasks for split in SPLITS if split not in splits}
    return [
        f"data {key}: the run has {known.get(key)}, the file is {now.get(key)}"
        for key in sorted((known.keys() | now.keys()) - left_out)
        if known.get(key) != now.get(key)
    ]


def encoder_differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Whether other encoders are given than were; their folders may have moved."""
    before, now = sorted(recorded.values()), sorted(found.values())
    return [] if before == now else [f"encoders: the run has {before}, given {now}"]


def _revision(model: str) -> str | None:
    """The commit of a model in the hub's cache: the name of its folder there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None
