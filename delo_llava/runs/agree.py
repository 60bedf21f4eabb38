"""All ranks must run the same code on the same data with the same settings: compared at the start."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from delo_llava.config import RunConfig, dump_config
from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_folders
from delo_llava.runs.record import base_facts, data_hashes, flat, versions
from delo_llava.runs.store import RunStore
from delo_llava.tasks import TaskSequence

#: Packages of this project whose source decides what is computed.
SOURCES = ("delo_llava", "delo_eval")
#: Differences that are shown.
SHOWN = 20


def require_agreement(ranks: Ranks, facts: Callable[[], dict[str, Any]]) -> None:
    """Compare every rank's `facts` with those of the others.

    Raises:
        DeloError: on every rank; each difference with the ranks and their values.
    """
    if ranks.world == 1:
        return
    mine: dict[str, Any] = {}
    ranks.run_each(lambda: mine.update(facts()))
    if len(set(ranks.each(_digest(mine)))) == 1:
        return
    everyone = ranks.each(mine)
    keys = sorted({key for found in everyone for key in found})
    lines = [line for key in keys for line in _line(key, everyone)]
    more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    raise DeloError(
        "\n".join(["The ranks do not run the same thing:", *lines[:SHOWN], *more]),
        fix="install one version on all nodes, and give them the same settings, data and base",
    )


def program_facts(config: RunConfig) -> dict[str, Any]:
    """Settings, versions and source of this rank; compared before anything is written."""
    return {
        **{f"config {key}": value for key, value in flat(yaml.safe_load(dump_config(config))).items()},
        **{f"version {key}": value for key, value in versions().items()},
        "source": source_hash(),
    }


def data_facts(store: RunStore, sequence: TaskSequence, model_path: str) -> dict[str, Any]:
    """Data and base that this rank sees; compared once the run is open, as the first rank has then noted the
    hashes of files that all of them share."""
    return {
        **{f"data {key}": value for key, value in flat(data_hashes(store, sequence, keep=False)).items()},
        "base weights": base_facts(store, model_path, keep=False)["sha256"],
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


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(found.items(), key=lambda item: item[0])).encode()).hexdigest()


def _line(key: str, everyone: list[dict[str, Any]]) -> list[str]:
    """One line if the ranks differ in `key`: each value with the ranks that have it."""
    holders: dict[str, list[int]] = {}
    for rank, found in enumerate(everyone):
        holders.setdefault(str(found.get(key)), []).append(rank)
    if len(holders) == 1:
        return []
    told = ", ".join(f"{value} on rank {' '.join(map(str, ranks))}" for value, ranks in holders.items())
    return [f"  {key}: {told}"]
