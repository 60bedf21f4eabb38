"""A stage that is evaluated already, with nothing changed since: known by its receipt, without torch.

`answers/<stage>.json` says what the evaluation was made of (settings, tasks, code, versions, and size and
time of every file that was read) and what it wrote. If anything differs, the evaluation runs: a receipt saves
work and decides nothing.
"""

import importlib
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from delo_eval.answers.code import package_hash, plugins_hash, source_hash
from delo_eval.answers.hashes import ANSWERS, digest, package_versions, told_writing
from delo_eval.harness.facts import run_facts, scorer_of
from delo_eval.harness.folder import AS_STORED, Request, RunFolder, open_folder
from delo_eval.matrix.accuracy import stage_name
from delo_eval.matrix.general import general_file
from delo_eval.matrix.results import Results, results_json, resume_results, write_results
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file, write_json_atomic
from delo_llava.runs.manifest import MANIFEST
from delo_llava.strict import read_json

logger = logging.getLogger(__name__)

SCHEMA = "delo-llava/evaluated/1"
#: Key of a receipt -> its type.
FORM = {
    "schema": str, "modules": list, "made_of": dict, "files": dict, "predictions": dict, "results": str,
    "answers": int,
}  # fmt: skip
#: Every package whose code may decide a number.
CODE = ("delo_llava", "delo_eval", "delo_recipes")
#: Where a driver shows that there may be a GPU that only torch can judge.
GPU_SIGNS = ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg")


def unchanged_stage(run_dir: Path, stage: int, request: Request = AS_STORED) -> dict[str, Any] | None:
    """The content of results.json if `stage` is evaluated and nothing it depends on has changed, else None.

    results.json is written anew with what training recorded since, and with this evaluation's seconds.

    Raises:
        DeloError: see `open_folder` and `RunFolder.adapters`; the folder cannot be written.
    """
    began = time.monotonic()
    run = open_folder(run_dir, request)
    receipt = _read(_file(run.output, stage)) if run.config.eval.cache else None
    if receipt is None or receipt["made_of"] != _made_of(run, stage, receipt["modules"]):
        return None
    if not all(_state(Path(path)) == state for path, state in receipt["files"].items()):
        return None
    damaged = [name for name, sha in receipt["predictions"].items() if _sha(run.output / name) != sha]
    for name in damaged:
        logger.warning("%s is not as it was written; it is written again", run.output / name)
    results = resume_results(run.output, run.config, run.plan)
    if damaged or receipt["results"] != _part_of(results, stage, run.patterns_of(stage)):
        return None
    results.eval_seconds[stage] = round(time.monotonic() - began, 3)
    results.answers[stage_name(stage)] = {"stored": receipt["answers"], "new": 0}
    content = results_json(results, run.config, run_facts(run))
    with told_writing(run.output):
        write_results(run.output, content)
    return content


def write_receipt(
    run: RunFolder,
    stage: int,
    results: Results,
    *,
    plugins: Iterable[str],
    read: Iterable[Path],
    written: Sequence[Path],
    answers: int,
) -> None:
    """Note that `stage` is evaluated.

    Args:
        plugins: modules of the method and the backbone.
        read: files that decided the answers, beside the adapters.
        written: the files of predictions.
        answers: number of questions.

    Raises:
        DeloError: the folder cannot be written.
    """
    names = sorted(plugins)
    receipt = {
        "schema": SCHEMA,
        "modules": names,
        "made_of": _made_of(run, stage, names),
        "files": {str(path): _state(path) for path in read},
        "predictions": {file.relative_to(run.output).as_posix(): _sha(file) for file in written},
        "results": _part_of(results, stage, run.patterns_of(stage)),
        "answers": answers,
    }
    with told_writing(run.output):
        write_json_atomic(_file(run.output, stage), receipt)


def _file(output: Path, stage: int) -> Path:
    return output / ANSWERS / f"{stage_name(stage)}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """The receipt; None where there is none that can be used."""
    if not file.is_file():
        return None
    try:
        content = read_json(file, "The receipt of an evaluation")
    except DeloError:
        return None
    whole = all(isinstance(content.get(key), kind) for key, kind in FORM.items())
    return content if whole and content["schema"] == SCHEMA else None


def _made_of(run: RunFolder, stage: int, modules: Sequence[str]) -> dict[str, Any]:
    """Settings, tasks, code, versions and adapters; every adapter is proven unchanged."""
    tasks = [[repr(task), scorer_of(task, run.config).id] for task in run.sequence.tasks]
    settings = run.config.model_dump(mode="json", exclude={"output": True, "eval": {"batch_size", "cache"}})
    return {
        "settings": settings,
        "tasks": digest(tasks),
        "patterns": run.patterns_of(stage),
        "general": _sha(general_file(run.output, stage)) if run.config.eval.general else None,
        "device": device_kind(run.config),
        "code": _code(modules),
        "versions": package_versions(),
        "adapters": [[task, sha256_file(path / MANIFEST)] for task, path in run.adapters(stage).items()],
    }


def _code(modules: Sequence[str]) -> list[str] | None:
    """Hashes of the source of this project, of folders of plug-ins, and of other modules; None where one of
    these is gone."""
    outside = tuple(name for name in map(str, modules) if name.partition(".")[0] not in CODE)
    ours = [package_hash(CODE), plugins_hash()]
    try:
        return [*ours, source_hash(outside)]
    except DeloError:
        return None


def device_kind(config: RunConfig) -> str:
    """`cpu` or `cuda`, asking torch only where there are signs of a GPU."""
    if config.device != "auto":
        return config.device
    if "torch" not in sys.modules and not any(Path(sign).exists() for sign in GPU_SIGNS):
        return "cpu"
    torch: Any = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _state(path: Path) -> list[int] | None:
    """Size and time of a file, None where there is none."""
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _sha(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _part_of(results: Results, stage: int, patterns: Sequence[str]) -> str:
    """One hash over what results.json holds of a stage."""
    scores = sorted(
        [mode, task, pattern, score]
        for (mode, of, task, pattern), score in results.matrix.scores.items()
        if of == stage and pattern in patterns
    )
    name = stage_name(stage)
    beside = results.choices.get(str(stage)), results.bad_images.get(name), results.omitted.get(name)
    return digest([scores, *(found or None for found in beside)])  # an empty one is not in the file
