"""What stands in the way of an export as far as a run's own record says it: told before torch is loaded."""

from pathlib import Path

from delo_llava.adapters.unmergeable import cannot_merge
from delo_llava.errors import DeloError
from delo_llava.runs.store import RunStore


def exportable_stages(run: Path, stage: str, target: Path) -> list[str]:
    """The names of a run's stages up to `stage`, which are all published.

    Args:
        stage: its name, its index from 0, or `last`.

    Raises:
        DeloError: the target exists, no such run or stage, or a method that its run's record calls one that
            cannot be merged (records of earlier versions do not say it).
    """
    if target.exists():
        raise DeloError("The folder to write is there already.", given=target, fix="name a new one")
    store = RunStore(run)
    if not store.config.is_file():
        raise DeloError("There is no run in this folder: config.yaml is missing.", given=run)
    recorded = store.read_run()
    if recorded.get("unmerged"):
        raise cannot_merge(recorded["method"], recorded["unmerged"])
    known = recorded.get("stages", {})
    names = [n for n in sorted(known, key=lambda n: known[n]["index"]) if store.adapter(n).is_dir()]
    if names and stage == "last":
        return names
    place = int(stage) if stage.isdecimal() else names.index(stage) if stage in names else -1
    if not 0 <= place < len(names):
        raise DeloError(
            "This stage does not exist or is not trained yet.", given=stage, allowed=[*names, "last"]
        )
    return names[: place + 1]
