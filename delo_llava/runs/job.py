"""What a run is to do: its settings, and everything they name, found and checked before anything is
written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from delo_llava.config import RunConfig
from delo_llava.data.recipe import load_general, load_sequence
from delo_llava.data.sampler import plan_accumulation
from delo_llava.engines.launched import launched
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin
from delo_llava.tasks import StagePlan, TaskSequence, TaskSpec

if TYPE_CHECKING:
    from delo_llava.backbones.base import Backbone
    from delo_llava.methods.base import Method


@dataclass(frozen=True)
class Job:
    """A run that could begin.

    Attributes:
        base: where the base's weights are, as `find_backbone` resolved it.
        plans: the stages to train, as the method has them.
        notes: which settings gave way, to be told.
        general: the tasks kept aside, where they are asked for.
    """

    config: RunConfig
    sequence: TaskSequence
    backbone: "Backbone"
    base: str
    method: "Method"
    plans: tuple[StagePlan, ...]
    notes: tuple[str, ...] = ()
    general: tuple[TaskSpec, ...] = ()


def make_job(config: RunConfig) -> Job:
    """Find what the settings name: tasks, base, method and its stages, DeepSpeed file.

    What a user can get wrong is told here, the cheap checks before torch is imported; no model is loaded.

    Args:
        config: validated; `output` may be None for the default folder.

    Raises:
        DeloError: whatever is wrong with data, batches, base, method or engine.
    """
    sequence = load_sequence(config.task_seq, config.data.root, config.data.template)
    source = (config.task_seq, config.data.root, config.data.template)
    general = load_general(*source) if config.eval.general else []
    for name in sequence.names:
        check_plan(config.for_task(name))
    from delo_llava.backbones._checkpoint import require_whole
    from delo_llava.backbones.base import find_backbone

    backbone, base = find_backbone(config.model)
    require_whole(base)
    backbone.limit_options(config.data.limits)
    from delo_llava.runs.positions import within_positions

    config, notes = within_positions(config, base_config(base))
    check_engine(config)
    kind: Any = load_plugin("method", config.method)
    method = kind(kind.Config(**config.methods.get(config.method, {})), config, backbone)
    check_refused(method, config)
    plans = method.stages(sequence)
    check_stages(plans, sequence)
    return Job(config, sequence, backbone, base, method, plans, tuple(notes), tuple(general))


def base_config(base: str) -> Any:
    """The configuration of a base that `find_backbone` resolved.

    Raises:
        DeloError: transformers refuses it.
    """
    from transformers import AutoConfig

    from delo_llava.backbones.base import OWN_CODE

    try:
        return AutoConfig.from_pretrained(base, **OWN_CODE)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DeloError(
            f"The model's config.json is refused by transformers: {error}",
            given=base,
            fix="take it from the checkpoint's own release",
        ) from error


def check_refused(method: "Method", config: RunConfig) -> None:
    """Let no run begin with a setting that its method cannot work with.

    Raises:
        DeloError: naming the setting and the reason.
    """
    for setting, reason in method.refuses().items():
        name, _, value = setting.partition("=")
        if str(getattr(config, name)) == value:
            raise DeloError(
                f"`{config.method}` does not work with --{name} {value}: {reason}",
                given=f"--method {config.method} --{name} {value}",
                fix=f"choose another --{name}; docs/support.md shows what works with what",
            )


def check_plan(config: RunConfig) -> int:
    """The number of ranks, once batches can be shared out among them.

    Raises:
        DeloError: ranks × micro-batch does not divide the global batch, several ranks without DeepSpeed, or
            a launcher's word that is no number.
    """
    world = launched().world
    if config.zero == "none" and world > 1:
        raise DeloError(
            "The one-process engine cannot run on several ranks",
            given=f"--zero none on {world} ranks",
            fix="start it with `python launch/train.py`, or choose --zero 1, 2 or 3",
        )
    plan_accumulation(config.train.global_batch, config.train.micro_batch, world)
    return world


def check_engine(config: RunConfig) -> None:
    """Check the DeepSpeed file before the process group is joined.

    Raises:
        DeloError: it cannot be read, decides what the run's configuration decides, or DeepSpeed refuses it.
    """
    if config.zero != "none":
        from delo_llava.engines.deepspeed import check_deepspeed_file

        check_deepspeed_file(config)


def check_stages(plans: Sequence[StagePlan], sequence: TaskSequence) -> None:
    """Refuse stages that a run's folder cannot hold.

    Raises:
        DeloError: two stages of one name, or a stage without tasks or with unknown ones.
    """
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names):
        raise DeloError("A method's stages must have names of their own", given=", ".join(names))
    for plan in plans:
        for task in plan.tasks or ("no task",):
            if task not in sequence.names:
                raise DeloError(
                    f"Stage {plan.name} trains what the sequence does not have",
                    given=task,
                    allowed=sequence.names,
                )
