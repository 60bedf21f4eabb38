"""What a run was made of (run.json), and the refusal to go on with anything else."""

import hashlib
import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from delo_llava import __version__
from delo_llava.config import RunConfig, dump_config, with_methods
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_folders, plugin_names
from delo_llava.runs.identity import (
    base_differences,
    base_facts,
    data_differences,
    data_hashes,
    encoder_differences,
    encoder_hashes,
)
from delo_llava.runs.job import Job
from delo_llava.runs.store import RunStore
from delo_llava.schema import flat, merged, read_yaml

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes", "tokenizers", "numpy")
#: Settings that are places, which may differ from launch to launch and from node to node: what lies there is
#: compared.
PLACES = ("data.root", "model")
#: Settings that may change between two launches of one run, since no number depends on them.
FREE = (
    "output",
    *PLACES,
    "eval.batch_size",
    "eval.cache",
    *(f"eval.{key}" for key in ("general", "general_stages")),  # tasks beside the matrix
    *(f"train.{key}" for key in ("log_every", "tensorboard", "save_every", "keep")),
    # What to do with a fault: a run that stopped at one may go on past it, and says so in its record.
    *(f"train.{key}" for key in ("on_nonfinite", "max_nonfinite", "on_oom", "patience")),
    *(f"data.{key}" for key in ("on_bad_image", "max_bad_images")),
)
#: Packages of this project whose source decides what is computed.
SOURCES = ("delo_llava", "delo_eval")
#: Settings that may change for the stages to come: they decide how these are computed (so the last digits),
#: not what.
COMPUTING = (
    "zero", "ds_config", "allow_ds_optimizer", "device", "train.micro_batch", "train.gradient_checkpointing",
)  # fmt: skip
#: Entries of run.json: whether the base was evaluated; why the last launch left before the end.
ZERO_SHOT, STOPPED = "zero_shot", "stopped"


def open_run(store: RunStore, job: Job) -> None:
    """Start a run's record, or check that this launch continues the recorded run. First rank only.

    A folder in which no stage was begun is free. In any other what was used must be the same; what is to come
    may change where only the way of computing does, or files of tasks that are not begun, and is recorded.

    Raises:
        DeloError: what was used differs from the run's; every difference is named.
    """
    config, sequence = job.config, job.sequence
    facts = run_facts(store, job)
    known, changes = store.read_run(), changes_of(store, job, facts)
    if known and not any(store.begun(plan.name) for plan in job.plans):
        known = _emptied(store, config, facts, known)
    if any(change["key"].startswith("data ") for change in changes):
        known = known | {ZERO_SHOT: False}  # the base's row is of other test files
    entries = {
        STOPPED: None,
        "schema": "delo-llava/run/1",
        "method": config.method,
        "unmerged": None if job.method.capabilities.mergeable else list(job.method.why_unmerged),
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
        "changes": known.get("changes", []) + changes,
    }
    store.begin(dump_config(config), known | facts | entries)


def run_facts(store: RunStore, job: Job, *, keep: bool = True) -> dict[str, Any]:
    """Hashes of a run's data, base and encoders.

    Args:
        keep: remember in the run's folder what was computed.
    """
    return {
        "data_hashes": data_hashes(store, job.sequence, keep=keep),
        "base": base_facts(store, job.base, keep=keep),
        "encoders": encoder_hashes(store, job.method.capabilities.encoders, keep=keep),
    }


def changes_of(store: RunStore, job: Job, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What is new in this launch of a run and may be, for the record; nothing of a run without begun stages.

    Args:
        facts: hashes of data, base and encoders.

    Raises:
        DeloError: what was used differs; one line for each difference.
    """
    known = store.read_run()
    used = {task for plan in job.plans if store.begun(plan.name) for task in plan.tasks}
    if not known or not used:
        return []
    stored = _stored_settings(store, job.config) if store.config.is_file() else {}
    given = flat(yaml.safe_load(dump_config(job.config)))
    keys = sorted((stored.keys() | given.keys()) - set(FREE)) if stored else []
    differing = [key for key in keys if stored.get(key) != given.get(key)]
    refused = [key for key in differing if not _may_change(key, used)]
    lines = [f"  {key}: the run has {stored.get(key)}, given {given.get(key)}" for key in refused]
    recorded, found = known.get("data_hashes", {}), facts["data_hashes"]
    later = set(job.sequence.names) - used
    lines += [f"  {line}" for line in data_differences(recorded, found, (set(recorded) | used) - later)]
    lines += [f"  {line}" for line in base_differences(known.get("base", {}), facts["base"])]
    lines += [f"  {line}" for line in encoder_differences(known.get("encoders", {}), facts["encoders"])]
    if lines:
        raise DeloError(
            "\n".join(["This folder holds a run made of something else:", *lines]),
            given=store.root,
            fix=f"give the same settings, data and base to continue it{_words(stored, refused)}, or another "
            "--output",
        )
    after = [plan.name for plan in job.plans if store.adapter(plan.name).exists()]
    changed = [(key, stored.get(key), given.get(key)) for key in differing]
    old, new = (flat({t: dict(h[t]) for t in later if t in h}) for h in (recorded, found))
    changed += [(f"data {k}", old.get(k), new.get(k)) for k in sorted(old | new) if old.get(k) != new.get(k)]
    return [{"after": after, "key": key, "from": before, "to": now} for key, before, now in changed]


def _may_change(key: str, used: set[str]) -> bool:
    """Whether a setting may change between two launches though numbers of stages to come depend on it."""
    section, _, rest = key.partition(".")
    return key in COMPUTING or (section == "per_task" and rest.partition(".")[0] not in used)


def _emptied(
    store: RunStore, config: RunConfig, facts: dict[str, Any], known: dict[str, Any]
) -> dict[str, Any]:
    """The record of a folder in which nothing was trained: kept if it is of the same run, else begun anew,
    without the base's answers of the other one.
    """
    same = store.config.is_file() and _stored_settings(store, config) == flat(
        yaml.safe_load(dump_config(config))
    )
    if same and all(known.get(key) == value for key, value in facts.items()):
        return known
    store.forget_results()
    return {}


def _words(settings: dict[str, Any], keys: Sequence[str]) -> str:
    """How the command line gives some settings, in brackets; nothing for none."""
    words = [f"--{key.removeprefix('methods.')}={json.dumps(settings.get(key))}" for key in keys]
    return f" ({' '.join(words)})" if words else ""


def _stored_settings(store: RunStore, config: RunConfig) -> dict[str, Any]:
    """The run's settings by dotted key; those that its version did not have yet at their defaults."""
    stored = read_yaml(store.config)
    names = {*config.methods, *stored.get("methods", {})} & set(plugin_names("method"))
    defaults = with_methods(RunConfig(method=config.method, methods={name: {} for name in names}))
    return flat(merged(yaml.safe_load(dump_config(defaults)), stored))


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
    settings = flat(yaml.safe_load(dump_config(config)))
    return {
        **{f"config {key}": value for key, value in settings.items() if key not in PLACES},
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
