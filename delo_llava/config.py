"""The run's configuration: typed sections, laid over each other as code < recipe < YAML < command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import yaml
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from delo_llava.data.images import ImageLimits
from delo_llava.data.missing import MissingSpec
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.schema import (
    MAX_INTEGER,
    NameOrPath,
    Section,
    UserPath,
    Word,
    checked,
    dotted_keys,
    merged,
    read_yaml,
)

__all__ = [
    "MissingSpec",
    "RunConfig",
    "check_tasks",
    "config_layers",
    "core_config",
    "dump_config",
    "load_config",
    "with_methods",
]

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
PatternName = Literal["run", "complete", "image", "text"]
#: A list that may be written `a,b` on the command line.
Patterns = Annotated[
    list[PatternName], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)
]


class DataConfig(Section):
    """Where the data is and how much of it is used.

    Attributes:
        root: data folder of the sequence; None means the recipe's own default.
        template: variant of the instructions, where the recipe has several; None means its first.
        sub: share of every training set that is used, drawn by the run's seed.
        max_length: longest prompt with answer, in tokens; context is cut first. At most the positions of the
            base: more is refused, and a default gives way.
        group_by_length: build batches of similar length.
        lengths: what these go by: `estimated` from characters and a constant for a picture, or every record's
            own `tokens` as it will be shown, which pays where pictures differ in size (Qwen-VL, tiles): texts
            are tokenised and the pictures' headers read before each stage.
        min_pixels, max_pixels: between which a picture is resized, for families that take any size
            (Qwen-VL); None keeps the checkpoint's own bounds.
        max_tiles: into which a picture is cut at most, for families whose tiles can be limited (InternVL).
        on_bad_image: an image that training cannot read is an `error`, or its record is left out (`skip`), up
            to `max_bad_images` records of a stage; never replaced by another.
        max_bad_images: how many records of a stage may be left out so.
    """

    root: UserPath | None = None
    template: str | None = None
    sub: float = Field(default=1.0, gt=0.0, le=1.0)
    max_length: int = Field(default=2048, ge=16)
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    max_tiles: int | None = Field(default=None, ge=1)
    group_by_length: bool = True
    lengths: Literal["estimated", "tokens"] = "estimated"
    on_bad_image: Literal["error", "skip"] = "error"
    max_bad_images: int = Field(default=10, ge=0)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "DataConfig":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self

    @property
    def asks_length(self) -> bool:
        """Whether `max_length` is what the user set; else it is a default, of the code or of the recipe."""
        return "max_length" in self.model_fields_set

    @property
    def limits(self) -> ImageLimits:
        """How large a picture is shown."""
        return ImageLimits(self.min_pixels, self.max_pixels, self.max_tiles)


class TrainConfig(Section):
    """One stage's training; the same for every task unless `per_task` says otherwise.

    Attributes:
        epochs: passes over the task's records; `max_steps`, when given, ends the stage earlier.
        max_steps: optimiser steps of a stage at most.
        global_batch: records per optimiser step over all ranks; accumulation is derived from it.
        micro_batch: records per forward pass of one rank.
        lr, projector_lr: peak learning rates of the language layers and the projector (None: the same).
        weight_decay: AdamW's, for every trained parameter.
        warmup: share of the steps spent warming up linearly, before a cosine to zero.
        clip: largest gradient norm; 0 switches clipping off.
        betas, eps: AdamW's.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time.
        log_every: steps between two lines of metrics.
        tensorboard: also write metrics for TensorBoard (the extra `track`).
        save_every: steps between two checkpoints inside a stage (0: only when a signal asks the run to
            leave).
        keep: the newest checkpoints of a stage that stay until its adapter is published.
        on_nonfinite: a loss or gradient that is not finite ends the run (`stop`), or its step is left out
            (`skip`), up to `max_nonfinite` steps of a stage.
        max_nonfinite: how many steps of a stage may be left out so.
        patience: seconds without progress after which a rank that is waited for is named and the run ends.
        on_oom: out of memory ends the run (`stop`), or the stage goes on from its last checkpoint with half
            the micro-batch and twice the accumulation (`halve`).
    """

    epochs: Positive = 1.0
    max_steps: int | None = Field(default=None, ge=1)
    global_batch: int = Field(default=32, ge=1)
    micro_batch: int = Field(default=16, ge=1)
    lr: Positive = 2e-4
    projector_lr: Positive | None = None
    weight_decay: float = Field(default=0.0, ge=0.0)
    warmup: Ratio = 0.03
    clip: float = Field(default=1.0, ge=0.0)
    betas: tuple[Ratio, Ratio] = (0.9, 0.999)
    eps: Positive = 1e-8
    gradient_checkpointing: bool = False
    log_every: int = Field(default=10, ge=1)
    tensorboard: bool = False
    save_every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = Field(default=10, ge=0)
    on_oom: Literal["stop", "halve"] = "stop"
    patience: float = Field(default=600.0, gt=0.0)


class EvalConfig(Section):
    """How every stage is evaluated.

    Attributes:
        batch_size: records that are answered together.
        split: `test`, or `val` where the sequence has validation files.
        limit: records per task, for trials; None means all.
        wording: asked in place of every instruction, whatever the task, to see what images and contexts alone
            tell; None asks what the data asks.
        num_beams: 1 decodes greedily.
        patterns: missing patterns evaluated after every stage; `run` is the run's own specification.
        last_patterns: patterns evaluated after the last stage on top of them.
        oracle: also evaluate with the true task given, for methods that choose one.
        cache: reuse answers that an earlier evaluation gave under the same model, settings and data; without
            it, an interrupted evaluation starts anew.
        scoring: `native` is the right rule of each task, `compat` what its benchmark's official script does.
        general: also ask the tasks that the recipe keeps aside and no stage trains, of the base and after the
            last stage, with nothing missing: how much general ability was lost.
        general_stages: `all` asks them after every stage, `ends` after the last alone.
        on_bad_reference: `skip` does not ask questions whose reference lacks what their scorer needs, or that
            it does not count, and says how many; a score is then of the others.
    """

    scoring: Literal["native", "compat"] = "native"
    batch_size: int = Field(default=32, ge=1)
    split: Literal["test", "val"] = "test"
    limit: int | None = Field(default=None, ge=1)
    wording: str | None = Field(default=None, min_length=1)
    num_beams: int = Field(default=1, ge=1)
    patterns: Patterns = ["run"]
    last_patterns: Patterns = ["complete", "image", "text"]
    oracle: bool = True
    general: bool = False
    general_stages: Literal["ends", "all"] = "ends"
    on_bad_reference: Literal["error", "skip"] = "error"
    cache: bool = True


class RunConfig(Section):
    """Everything that decides a run.

    Attributes:
        task_seq: name of a shipped recipe, or a recipe file.
        model: name of a shipped model, a checkpoint folder, or a hub id.
        method: what learns: `delo-llava list methods` says what each one is.
        seed: of initial weights, order of records, dropout; independent of `missing.seed`.
        quant: `nf4` keeps the frozen base in 4 bit, `none` in `dtype`.
        device, dtype, attn: `auto` takes CUDA where it is, bfloat16 there and float32 on a CPU, and the
            fastest attention that the model has.
        output: the run's folder; None means `runs/<task_seq>-<method>-s<seed>`.
        zero: key of a file in `ds_configs/`, or `none` for the one-process engine.
        ds_config: a DeepSpeed file of the user's own, instead of `zero`.
        allow_ds_optimizer: accept `optimizer` and `scheduler` sections in DeepSpeed files.
        per_task: settings of `train` that differ for single tasks, by task name: `--per_task.gqa.lr=1e-4`.
        methods: settings of each method by its name; validated by the method's own `Config`.
    """

    task_seq: NameOrPath = "mini6"
    model: NameOrPath = "mini-llava"
    method: str = "delo"
    output: UserPath | None = None
    seed: int = Field(default=0, ge=0, le=MAX_INTEGER)
    quant: Literal["nf4", "none"] = "nf4"
    zero: str = "2"
    ds_config: UserPath | None = None
    allow_ds_optimizer: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    missing: MissingSpec = MissingSpec()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    per_task: dict[str, dict[str, Any]] = {}
    methods: dict[str, dict[str, Any]] = {}

    @property
    def run_dir(self) -> Path:
        """Where the run is written: `output`, or its default."""
        return self.output or Path("runs") / f"{Path(self.task_seq).stem}-{self.method}-s{self.seed}"

    def located(self, root: Path | None) -> "RunConfig":
        """With whole paths, so that the run is found again from any folder; `root` is the data's."""
        model, recipe = Path(self.model), Path(self.task_seq)
        known: dict[str, Any] = {
            "model": str(model.absolute()) if model.is_dir() else self.model,
            "task_seq": str(recipe.absolute()) if recipe.is_file() else self.task_seq,
            "ds_config": self.ds_config and self.ds_config.absolute(),
            "data": self.data.model_copy(update={"root": root}),
        }
        return self.model_copy(update=known)

    def for_task(self, task: str) -> "RunConfig":
        """This configuration with what `per_task` says of one task put into `train`."""
        return self.for_tasks([task])

    def for_tasks(self, tasks: Sequence[str]) -> "RunConfig":
        """This configuration with what `per_task` says alike of all of some tasks put into `train`."""
        first, *others = [self.per_task.get(task, {}) for task in tasks]
        common = {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}
        train = TrainConfig.model_validate(self.train.model_dump() | common)
        return self.model_copy(update={"train": train}) if common else self


class _HasConfig(Protocol):
    """What this module needs to know of a method."""

    Config: type[BaseModel]


def load_config(
    config: Path | None = None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """The run's configuration, completely validated, `output` and the method's section filled in.

    Args:
        config: a YAML file, or None.
        overrides: command-line words such as `--train.lr=1e-3`, `--seed 1`, `--train.tensorboard`.
        defaults: nested keys of the recipe (`data.recipe.recipe_defaults`), below the file and the words.

    Raises:
        DeloError: an unknown key or value, told with the closest allowed one.
    """
    return with_methods(core_config(config_layers(config, overrides), defaults))


def config_layers(config: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The YAML file with the command line laid over it, not validated yet: enough to learn `task_seq`."""
    given = _methods_collected(read_yaml(config)) if config else {}
    return merged(given, _methods_collected(parse_overrides(overrides)))


def core_config(given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> RunConfig:
    """Validate everything but the methods' own sections; imports neither torch nor a method.

    Raises:
        DeloError: as `load_config`.
    """
    tree = merged(_without_overruled(_methods_collected(defaults or {}), given), given)
    config = checked(RunConfig, tree, where="the configuration", also=plugin_names("method"))
    if "max_length" not in (given.get("data") or {}):
        config.data.model_fields_set.discard("max_length")
    per_task = {name: _task_section(name, section) for name, section in config.per_task.items()}
    _known("method", config.method)
    if config.zero != "none" and config.ds_config is None:
        _known("zero", config.zero, extra=["none"])
    for name in config.methods:
        _known("method", name)
    return config.model_copy(update={"output": config.run_dir, "per_task": per_task})


def with_methods(config: RunConfig) -> RunConfig:
    """Validate the methods' sections by their own `Config` and fill in defaults.

    Sections of other methods stay: the baselines take their size from DeLo's.

    Raises:
        DeloError: as `load_config`.
    """
    sections: dict[str, dict[str, Any]] = {config.method: {}} | config.methods
    resolved = {name: _method_section(name, section) for name, section in sections.items()}
    return config.model_copy(update={"methods": resolved})


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` of it gives the same configuration again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Nested keys from `--a.b=c`, `--a.b c` and, for true, `--a.b`; values are `Word`s, dashes of a key
    underscores.

    Raises:
        DeloError: a word without a key in front of it, or a key used as both value and section.
    """
    result: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise DeloError(
                "Overrides are written --key=value or --key value.",
                given=word,
                allowed=dotted_keys(RunConfig),
            )
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        _set(result, key.replace("-", "_"), Word(text))
    return result


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    """Put `value` at the dotted `key`, creating sections on the way."""
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise DeloError(
                f"`{part}` of --{key} already has a value and cannot be a section.", given=f"--{key}"
            )
    tree[last] = value


def _methods_collected(given: Mapping[str, Any]) -> dict[str, Any]:
    """Move top-level keys that name a method (`delo: {rank: 8}`) under `methods`."""
    names = {key for key in given if key not in RunConfig.model_fields} & set(plugin_names("method"))
    rest = {key: value for key, value in given.items() if key not in names}
    return merged(rest, {"methods": {name: given[name] for name in sorted(names)}}) if names else rest


def _without_overruled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's defaults without what it sets for single tasks and the user sets for all (`train.…`)."""
    overruled = given.get("train", {})
    tasks = {
        task: left
        for task, section in defaults.get("per_task", {}).items()
        if (left := {key: value for key, value in section.items() if key not in overruled})
    }
    return {**defaults, "per_task": tasks}


def check_tasks(config: RunConfig, names: Sequence[str]) -> None:
    """Refuse settings of single tasks that the sequence does not have.

    Raises:
        DeloError: names the task.
    """
    for task in config.per_task:
        if task not in names:
            raise DeloError(f"`per_task` names no task of {config.task_seq}.", given=task, allowed=names)


def _known(kind: str, name: str, extra: Sequence[str] = ()) -> None:
    """Refuse a name that is no plug-in of `kind`."""
    allowed = [*plugin_names(kind), *extra]
    if name not in allowed:
        raise DeloError(f"There is no {kind} called {name!r}.", given=name, allowed=allowed)


def _task_section(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """What one task sets of `train`, read and validated."""
    known = checked(TrainConfig, section, where="the configuration", prefix=f"per_task.{name}.")
    return {key: known.model_dump()[key] for key in section}


def _method_section(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """One method's settings with its defaults filled in."""
    method = cast(_HasConfig, load_plugin("method", name))
    known = checked(method.Config, section, where="the configuration", prefix=f"{name}.")
    return known.model_dump(mode="json")
