"""Whether a stored run still has the base and the data that it was trained and evaluated with."""

import os
from collections.abc import Collection
from dataclasses import replace

from delo_eval.harness.model import StoredRun
from delo_llava.errors import DeloError
from delo_llava.runs.identity import (
    base_differences,
    base_facts,
    data_differences,
    data_hashes,
    encoder_differences,
    encoder_hashes,
)


def differences(run: StoredRun, tasks: Collection[str]) -> list[str]:
    """How base, encoders and evaluated files of some tasks differ from what run.json recorded, a line each;
    files of other splits are not looked at, as they may not be on this machine.
    """
    recorded, split = run.store.read_run(), run.config.eval.split
    keep = os.access(run.store.logs, os.W_OK)
    lines = base_differences(recorded.get("base", {}), base_facts(run.store, run.model_path, keep=keep))
    encoders = encoder_hashes(run.store, run.method.capabilities.encoders, keep=keep)
    lines += encoder_differences(recorded.get("encoders", {}), encoders)
    if "data_hashes" not in recorded:
        return lines
    asked = tuple(
        replace(task, files={split: task.files[split]}) for task in run.sequence.tasks if task.name in tasks
    )
    found = data_hashes(run.store, replace(run.sequence, tasks=asked), keep=keep)
    return lines + data_differences(recorded["data_hashes"], found, tasks, splits=(split,))


def require_same(run: StoredRun, tasks: Collection[str], elsewhere: bool) -> list[str]:
    """The differences, which only an evaluation into a folder of its own may have.

    Raises:
        DeloError: there are any, and the results would go among the run's own.
    """
    lines = differences(run, tasks)
    if lines and not elsewhere:
        raise DeloError(
            "\n".join(["Base or data are not those of this run:", *(f"  {line}" for line in lines)]),
            given=run.store.root,
            fix="put them back, or evaluate into a folder of its own, marked: --output FOLDER",
        )
    return lines
