"""What methods over low-rank pairs share: size, fresh and earlier adapters, files, which ones answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from pydantic import Field
from torch import nn

from delo_llava.adapters.lowrank import LowRankConfig, Mixer, inject, mixed
from delo_llava.adapters.store import open_adapters, save_adapter
from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.methods._size import matched_rank
from delo_llava.methods.base import Method, MethodConfig, Past, Stage

#: The adapter of methods that have only one.
ADAPTER = "default"


class LowRankOptions(MethodConfig):
    """Options of every method that trains low-rank pairs, PEFT's or our own.

    Attributes:
        rank: a number, or `match`: the rank whose trainable parameters come nearest to those that the method
            `like` trains in a stage.
        like: a method's name.
        alpha_over_rank: the update is scaled by this factor (alpha / r).
        dropout: on the adapter's input, while training.
    """

    rank: Literal["match"] | int = "match"
    like: str = "delo"
    alpha_over_rank: float = Field(2.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class LowRankMethod(Method):
    """The common ground: plain next-token loss, one adapter of the stage's or a common name.

    Attributes:
        multiple: the rank must be a multiple of this (experts that share it).
        outputs: of the router beside every pair; 0: none.
    """

    Config = LowRankOptions
    multiple: int = 1
    outputs: int = 0

    def config(self, base: nn.Module) -> LowRankConfig:
        """The adapter's configuration for every language and projector linear of `base`."""
        return lowrank_config(self.options, base, self.backbone, self.run, self.multiple, self.outputs)

    def fresh(self, base: nn.Module, name: str, mix: Mixer | None = None) -> Any:
        """`base` with a new adapter, zero at the start (B = 0), the only one that trains."""
        return inject(base.requires_grad_(False), self.config(base), name, mix)

    def beside(self, base: nn.Module, past: Mapping[str, Past], name: str, mix: Mixer | None = None) -> Any:
        """A new adapter beside all earlier ones, which are frozen; all of them act."""
        if not past:
            return self.fresh(base, name, mix)
        model = self.opened(base, past, mix)
        model.add_adapter(name, self.config(base))
        activate(model, [*past, name], train=[name])
        return model

    def opened(
        self, base: nn.Module, past: Mapping[str, Past], mix: Mixer | None = None, only_last: bool = False
    ) -> Any:
        """`base` with published adapters, frozen: all of them act, or the last one under its common name."""
        folders = {name: stage.folder for name, stage in past.items()}
        if only_last:
            folders = {ADAPTER: list(folders.values())[-1]}
        model = mixed(open_adapters(base, folders, LowRankConfig), mix)
        activate(model, list(folders), train=[])
        return model

    def continued(self, base: nn.Module, past: Mapping[str, Past], mix: Mixer | None = None) -> Any:
        """The last published adapter, to be trained on."""
        model = self.opened(base, past, mix, only_last=True)
        activate(model, [ADAPTER], train=[ADAPTER])
        return model

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        save_adapter(model, stage.name if stage.name in model.peft_config else ADAPTER, folder)


def lowrank_config(
    options: LowRankOptions,
    base: nn.Module,
    backbone: Backbone,
    run: RunConfig,
    multiple: int,
    outputs: int,
    besides: int = 0,
    each: int = 0,
) -> LowRankConfig:
    """The configuration; a matched rank counts the routers too, and is rounded to a multiple.

    Args:
        besides: further trainable parameters, whatever the rank; each: and for each of its units.
    """
    if options.rank == "match":
        routers = outputs * sum(width for width, _ in adapted_linears(base, backbone).values())
        rank = matched_rank(options.like, base, backbone, run, besides=besides + routers, each=each)
        rank = max(multiple, round(rank / multiple) * multiple)
    else:
        rank = options.rank
    return LowRankConfig(
        r=rank, alpha=options.alpha_over_rank * rank, dropout=options.dropout, outputs=outputs,
        target_modules=backbone.language_pattern, projector_modules=backbone.projector_pattern,
        projector=backbone.projector_name, hidden_size=backbone.hidden_size(base),
    )  # fmt: skip


def activate(model: PeftModel, names: Sequence[str], train: Sequence[str]) -> None:
    """Let some adapters act, of which some train; all others are frozen."""
    tuner: Any = model.base_model
    tuner.set_adapter(list(names), inference_mode=True)
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in name and "lowrank_" in name for adapter in train):
            parameter.requires_grad_(True)
