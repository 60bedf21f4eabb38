"""What the harness knows of a run beside its answers: scorers, and what training recorded."""

from typing import Any, cast

from delo_eval.harness.folder import RunFolder
from delo_eval.matrix.general import read_general
from delo_eval.matrix.passport import passport
from delo_eval.matrix.plan import Plan
from delo_eval.scorers.base import Scorer
from delo_llava.config import RunConfig
from delo_llava.registry import load_plugin
from delo_llava.tasks import TaskSpec


def scorer_of(task: TaskSpec, config: RunConfig) -> Scorer:
    """The scorer that the task's recipe names, in the mode the run asks for."""
    return cast(Scorer, load_plugin("scorer", task.scorer)).in_mode(config.eval.scoring)


def run_facts(run: RunFolder) -> dict[str, Any]:
    """What training recorded in run.json and results.json repeats; None where it recorded nothing."""
    recorded = run.store.read_run()
    stages = {name: run.store.stage(name) for name in run.plan.names}
    worlds = [stage["world"] for stage in stages.values() if "world" in stage]
    engines = [stage["zero"] for stage in stages.values() if "zero" in stage]
    scorer_ids = {task.name: scorer_of(task, run.config).id for task in run.sequence.tasks}
    return {
        "passport": passport(run.config, recorded, run.sequence.tasks, scorer_ids),
        "scorer_ids": scorer_ids,
        "world": worlds[-1] if worlds else None,
        "zero": engines[-1] if engines else run.config.zero,
        "changes": recorded.get("changes", []),
        "start_weights": {"name": run.config.model, "sha256": recorded.get("base", {}).get("sha256")},
        "encoders": recorded.get("encoders", {}),
        "data_hashes": recorded.get("data_hashes"),
        "versions": recorded.get("versions"),
        "trainable_parameters_per_task": _recorded(stages, "trainable_parameters"),
        "train_seconds": [stage.get("train_seconds") for stage in stages.values()],
        "missing_train": _missing(run.plan, stages),
        "general": read_general(run.output, run.plan, run.store),
    }


def _recorded(stages: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """One entry of every stage that has it, by its name."""
    return {name: stage[key] for name, stage in stages.items() if key in stage}


def _missing(plan: Plan, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was missing in the training records of each task; a stage of several records it by task."""
    found: dict[str, Any] = {}
    for planned in plan.stages:
        known = stages[planned.name].get("missing")
        if known is not None:
            found |= {planned.tasks[0]: known} if len(planned.tasks) == 1 else known
    return found
