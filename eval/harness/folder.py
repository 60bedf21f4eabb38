"""A run's folder opened for evaluation. Imports nothing slow, as an unchanged stage needs no model."""

from dataclasses import dataclass
from pathlib import Path

from delo_eval.matrix.accuracy import ZERO_SHOT
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import WORDED
from delo_llava.config import RunConfig, config_layers, core_config
from delo_llava.data.recipe import load_sequence
from delo_llava.errors import DeloError
from delo_llava.runs.store import RunStore
from delo_llava.tasks import TaskSequence


@dataclass(frozen=True)
class Request:
    """What an evaluation of a stored run may change; None keeps what the run's configuration says.

    Attributes:
        split: `val` or `test`.
        patterns: missing patterns.
        limit: records per task.
        batch_size: of decoding; changes speed, not results.
        output: folder of predictions and results; the run's own, or `<run>/eval-<split>` for another split.
        cache: whether answers of earlier evaluations are used.
        data_root: where the data lies now; what lies there must be what the run was made of.
        general: also ask the tasks that the recipe keeps aside, after every stage that is evaluated.
        wording: asked in place of every instruction; results go to `WORDED` in the run's folder by default.
    """

    split: str | None = None
    patterns: tuple[str, ...] | None = None
    limit: int | None = None
    batch_size: int | None = None
    output: Path | None = None
    cache: bool | None = None
    data_root: Path | None = None
    wording: str | None = None
    general: bool | None = None


#: Everything as the run's configuration says.
AS_STORED = Request()


@dataclass
class RunFolder:
    """A stored run; `plan` has its stages, `output` is where predictions and results go."""

    store: RunStore
    config: RunConfig
    sequence: TaskSequence
    plan: Plan
    output: Path
    patterns: tuple[str, ...] | None

    def patterns_of(self, stage: int) -> list[str]:
        """The patterns to evaluate after `stage`: the run's, and further ones after the last."""
        chosen = self.config.eval
        last = stage == self.plan.last
        return list(
            dict.fromkeys(self.patterns or [*chosen.patterns, *(chosen.last_patterns if last else [])])
        )

    def adapters(self, stage: int) -> dict[str, Path]:
        """Stage -> published folder of the stages up to `stage`, proven unchanged.

        Raises:
            DeloError: a stage that does not exist or is not trained, or a folder that is not what was
                published.
        """
        names = self.plan.names
        if not ZERO_SHOT <= stage < len(names):
            raise DeloError("There is no such stage.", given=stage, allowed=range(ZERO_SHOT, len(names)))
        done = names[: stage + 1]
        for name in done:
            if not self.store.adapter(name).is_dir():
                raise DeloError(
                    f"Stage {names.index(name)} ({name}) is not trained yet.", given=self.store.root
                )
        self.store.verify_published(done)
        return {name: self.store.adapter(name) for name in done}


def open_folder(run_dir: Path, request: Request = AS_STORED) -> RunFolder:
    """Read a run's stored configuration with the request laid over it.

    Raises:
        DeloError: no run there, data gone, or an impossible request.
    """
    store = RunStore(run_dir)
    if not store.config.is_file():
        raise DeloError(
            "There is no run in this folder: config.yaml is missing.",
            given=run_dir,
            fix="name a folder that training wrote",
        )
    stored = core_config(config_layers(store.config, []))
    changes = {
        "split": request.split, "limit": request.limit, "batch_size": request.batch_size,
        "cache": request.cache, "wording": request.wording, "general": request.general,
        "general_stages": "all" if request.general else None,
    }  # fmt: skip
    wanted = stored.eval.model_copy(
        update={key: value for key, value in changes.items() if value is not None}
    )
    data = stored.data.model_copy(update={"root": request.data_root or stored.data.root})
    config = stored.model_copy(update={"eval": wanted, "data": data, "output": stored.output or run_dir})
    own = run_dir
    if any(getattr(wanted, key) != getattr(stored.eval, key) for key in ("split", "limit", "wording")):
        own = run_dir / (WORDED if request.wording else f"eval-{wanted.split}")
    sequence = load_sequence(config.task_seq, config.data.root, config.data.template)
    plan = Plan.read({**store.read_run(), "tasks": sequence.names})
    return RunFolder(store, config, sequence, plan, request.output or own, request.patterns)
