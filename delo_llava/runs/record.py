"""What a run was made of (run.json), and the refusal to go on with anything else."""

import hashlib
import importlib.util
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from delo_llava import __version__
from delo_llava.config import RunConfig, dump_config, with_methods
from delo_llava.errors import DeloError
from delo_llava.files import HashCache, combined_hash
from delo_llava.registry import plugin_folders, plugin_names
from delo_llava.runs.job import Job
from delo_llava.runs.store import RunStore
from delo_llava.schema import flat, merged, read_yaml
from delo_llava.tasks import TaskSequence

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes", "tokenizers", "numpy")
#: Settings that may change between two launches of one run, since no number depends on them.
FREE = (
    "output",
    "eval.batch_size",
    "eval.cache",
    *(f"train.{key}" for key in ("log_every", "tensorboard", "save_every", "keep")),
    # What to do with a fault: a run that stopped at one may go on past it, and says so in its record.
    *(f"train.{key}" for key in ("on_nonfinite", "max_nonfinite", "on_oom", "patience")),
    *(f"data.{key}" for key in ("on_bad_image", "max_bad_images")),
)
#: Packages of this project whose source decides what is computed.
SOURCES = ("delo_llava", "delo_eval")
WEIGHTS = ("*.safetensors", "*.bin", "config.json")
#: Files of an encoder's folder that decide its features: weights, tokenizer, how images are prepared.
ENCODER_FILES = ("*.safetensors", "*.json", "merges.txt")


def open_run(store: RunStore, job: Job) -> None:
    """Start a run's record, or check that this launch continues the recorded run. First rank only.

    Raises:
        DeloError: the configuration, the data or the base differs from the run's; every difference is named.
    """
    config, sequence = job.config, job.sequence
    facts = {
        "data_hashes": data_hashes(store, sequence),
        "base": base_facts(store, job.base),
        "encoders": encoder_hashes(store, job.method.capabilities.encoders),
    }
    known = store.read_run()
    if known:
        refuse_differences(store, config, facts, known)
    entries = {
        "stopped": None,
        "schema": "delo-llava/run/1",
        "method": config.method,
        "tasks": sequence.names,
        "plan": [asdict(plan) for plan in job.plans],
        "template": sequence.template,
        "side_files": {
            task.name: {"joined": list(task.beside), "absent": list(task.absent)}
            for task in sequence.tasks
            if task.beside or task.absent
        },
        "versions": versions(),
        "seeds": {"run": config.seed, "missing": config.missing.seed},
        "stages": known.get("stages", {}),
    }
    store.begin(dump_config(config), known | facts | entries)


def refuse_differences(
    store: RunStore, config: RunConfig, facts: dict[str, Any], known: dict[str, Any]
) -> None:
    """Compare configuration, data hashes and base hash with the recorded ones.

    Raises:
        DeloError: one line for each difference.
    """
    stored = _stored_settings(store, config) if store.config.is_file() else {}
    given = flat(yaml.safe_load(dump_config(config)))
    keys = sorted((stored.keys() | given.keys()) - set(FREE)) if stored else []
    lines = [
        f"  {k}: the run has {stored.get(k)}, given {given.get(k)}"
        for k in keys
        if stored.get(k) != given.get(k)
    ]
    recorded, found = flat(known.get("data_hashes", {})), flat(facts["data_hashes"])
    for key in sorted(recorded.keys() | found.keys()):
        if recorded.get(key) != found.get(key):
            lines.append(f"  data {key}: the run has {recorded.get(key)}, the file is {found.get(key)}")
    before, now = known.get("base", {}).get("sha256"), facts["base"]["sha256"]
    if before != now:
        lines.append(f"  base weights: the run has {before}, {facts['base']['path']} is {now}")
    encoders = sorted(known.get("encoders", {}).values()), sorted(facts["encoders"].values())
    if encoders[0] != encoders[1]:
        lines.append(f"  encoders: the run has {encoders[0]}, given {encoders[1]}")
    if lines:
        raise DeloError(
            "\n".join(["This folder holds a run made of something else:", *lines]),
            given=store.root,
            fix="give the same settings, data and base to continue it, or another --output",
        )


def _stored_settings(store: RunStore, config: RunConfig) -> dict[str, Any]:
    """The run's settings by dotted key; those that its version did not have yet at their defaults."""
    stored = read_yaml(store.config)
    names = {*config.methods, *stored.get("methods", {})} & set(plugin_names("method"))
    defaults = with_methods(RunConfig(method=config.method, methods={name: {} for name in names}))
    return flat(merged(yaml.safe_load(dump_config(defaults)), stored))


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


def base_facts(store: RunStore, model_path: str, *, keep: bool = True) -> dict[str, str | None]:
    """Where the base came from and one sha256 over its weight files; a hub id that is no folder has none."""
    folder = Path(model_path)
    if not folder.is_dir():
        return {"path": model_path, "sha256": None}
    cache = HashCache(store.logs / "hashes.json")
    found = combined_hash(cache, {file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if keep:
        cache.save()
    return {"path": model_path, "sha256": found}


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


def versions() -> dict[str, str | None]:
    """Versions of Python, of what decides numbers, and of this project with its commit."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "delo-llava": __version__,
        "git": _commit(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def program_facts(config: RunConfig) -> dict[str, Any]:
    """Settings, versions and source of this rank; compared before anything is written."""
    return {
        **{f"config {key}": value for key, value in flat(yaml.safe_load(dump_config(config))).items()},
        **{f"version {key}": value for key, value in versions().items()},
        "source": source_hash(),
    }


def data_facts(store: RunStore, job: Job) -> dict[str, Any]:
    """Data and base that this rank sees; compared once the run is open, as the first rank has then noted the
    hashes of files that all of them share."""
    return {
        **{f"data {key}": value for key, value in flat(data_hashes(store, job.sequence, keep=False)).items()},
        "base weights": base_facts(store, job.base, keep=False)["sha256"],
        **{
            f"encoder {folder}": sha
            for folder, sha in encoder_hashes(store, job.method.capabilities.encoders, keep=False).items()
        },
    }


@cache
def source_hash() -> str:
    """One sha256 over all Python files of this project's packages and of folders of plug-ins."""
    digest = hashlib.sha256()
    for package, folder in [*_sources(), *(("plug-ins", folder) for folder in plugin_folders())]:
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[tuple[str, Path]]:
    """(package, folder) of this project's packages."""
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield package, Path(folder)


def _commit() -> str | None:
    """The commit this package was run from; None outside a checkout of its own."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
