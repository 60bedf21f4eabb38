"""The options of DeLo, what of them excludes what, and the adapter that they make of a base."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.methods._linears import Linears, narrowed, placed
from delo_llava.methods.base import MethodConfig
from delo_llava.methods.delo.config import DeloConfig, router_parameter_count, trainable_parameter_count


class DeloOptions(MethodConfig):
    """Options of DeLo; symbols of the paper in brackets. docs/delo.md has a table of the ablations.

    Attributes:
        pool_size: factors per pool [E].
        rank: factors chosen per sample, the rank of each modality's update [r].
        alpha: the update is scaled by alpha ÷ √(factors that act on a token) [s]: `rank`, twice it with scope
            `all`. So one learning rate serves any pool and rank (rank-stabilised LoRA, arXiv 2312.03732, and
            docs/delo.md, which has the trials).
        alpha_over_rank: the scale itself, in place of the above. The release's undivided alpha = 2 over
            factors drawn from N(0, 1) is too large a step (trap T13).
        latent: width of the router's shared down-projection of a query.
        scope: `own` applies a modality's update to that modality's tokens, `all` to every token.
        linears: which linears of the language layers have experts: `all`, those of `attention`, its `qkv` as
            in the release, or those of the `mlp`.
        projector: whether the projector's linears have experts, too.
        pools: `modality` gives each modality a pool of its own; `shared` lets both choose from one pool, each
            with its own selectors (half the pools: twice the pool_size compares at about equal size).
        task: `chosen` gives each task pools of its own, and the key memory picks the task of a sample;
            `oracle` too, but the true task must be given and no keys are kept; `shared` trains one set of
            pools and selectors through all tasks, so nothing is picked.
        gate: `ste` gives routers a gradient without changing the function; `none` is index-only: the routers
            stay frozen as they were drawn; `softmax` weights the factors.
        temperature: of the gate's softmax [tau].
        conditional: how the choice of B depends on that of A: `table`, `factor` (the exact form, larger) or
            `none`.
        cross_modal: the map from the present modality's query to the missing one's: `identity`, `linear` or
            `ridge`; `none` guides nothing: the missing modality's query is zero.
        ridge: relative ridge of the closed-form map.
        ridge_samples: complete samples per task that enter the ridge statistics.
        matcher: how the task is chosen: `cosine` to the keys, or `lda` with a shared covariance.
        views: the evidence used for the choice.
        unfamiliar: with `lda`, a view that is so many times farther from every task than training samples are
            on average says nothing, unless no view is nearer; 0: every view speaks.
        align: weight of the alignment loss [lambda_a]; 0 turns it off.
        consistency: weight of the consistency loss [lambda_c]; 0 turns it off. It costs one more forward, on
            complete rows with one modality dropped.
    """

    pool_size: int = Field(16, ge=1)
    rank: int = Field(4, ge=1)
    alpha: float = Field(16.0, gt=0)
    alpha_over_rank: float | None = Field(None, gt=0)
    latent: int = Field(64, ge=1)
    scope: Literal["own", "all"] = "own"
    linears: Linears = "all"
    projector: bool = True
    pools: Literal["modality", "shared"] = "modality"
    task: Literal["chosen", "oracle", "shared"] = "chosen"
    gate: Literal["ste", "none", "softmax"] = "ste"
    temperature: float = Field(1.0, gt=0)
    conditional: Literal["table", "factor", "none"] = "table"
    cross_modal: Literal["identity", "linear", "ridge", "none"] = "ridge"
    ridge: float = Field(1e-2, gt=0)
    ridge_samples: int = Field(512, ge=1)
    matcher: Literal["cosine", "lda"] = "lda"
    views: tuple[Literal["image", "text", "instruction"], ...] = ("image", "text", "instruction")
    unfamiliar: float = Field(8.0, ge=0)
    align: float = Field(0.0, ge=0)
    consistency: float = Field(0.0, ge=0)

    @property
    def scale(self) -> float:
        """Factor of the update [s]."""
        acting = self.rank * (2 if self.scope == "all" else 1)
        return self.alpha / acting**0.5 if self.alpha_over_rank is None else self.alpha_over_rank

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DeloOptions":
        for fault in self._faults():
            raise ValueError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        """Options that together mean nothing, each with a remedy."""
        if self.rank > self.pool_size:
            yield f"rank {self.rank} is larger than pool_size {self.pool_size}; choose rank <= pool_size"
        if self.align and self.cross_modal == "none":
            yield (
                "align compares a query with what is mapped from the other modality, and cross_modal=none "
                "maps nothing; set align to 0 or choose another cross_modal"
            )
        if self.cross_modal == "linear" and self.gate == "none" and not self.align:
            yield (
                "cross_modal=linear learns through the gate or the alignment loss, and gate=none with "
                "align=0 leaves it neither; choose gate=ste, align > 0 or another cross_modal"
            )
        if self.align and self.gate == "none" and self.cross_modal != "linear":
            yield (
                "align trains the selectors, which gate=none freezes; set align to 0 or choose gate=ste or "
                "cross_modal=linear"
            )
        changed = [n for n in ("matcher", "views") if getattr(self, n) != type(self).model_fields[n].default]
        if self.task != "chosen" and changed:
            yield f"{' and '.join(changed)} decide how a task is chosen, and task={self.task} chooses none"


def adapter_config(options: DeloOptions, base: nn.Module, backbone: Backbone) -> DeloConfig:
    """The PEFT configuration for the language and projector linears of `base` that the options name.

    Raises:
        DeloError: this family has no language linears of that kind.
    """
    placed(adapted_linears(base, backbone), backbone, options.linears, options.projector)
    return DeloConfig(
        r=options.rank, pool_size=options.pool_size, alpha=options.scale * options.rank,
        scope=options.scope, pools=options.pools,
        gate=options.gate, temperature=options.temperature, conditional=options.conditional,
        latent=options.latent, cross_modal=options.cross_modal,
        target_modules=narrowed(backbone.language_pattern, options.linears),
        projector_modules=backbone.projector_pattern if options.projector else None,
        projector=backbone.projector_name, hidden_size=backbone.hidden_size(base),
    )  # fmt: skip


def trainable_parameters(options: DeloOptions, base: nn.Module, backbone: Backbone) -> int:
    """Trainable parameters of one task; the LoRA baselines are matched to it."""
    linears = placed(adapted_linears(base, backbone), backbone, options.linears, options.projector)
    return trainable_parameter_count(adapter_config(options, base, backbone), linears)


def router_parameters(options: DeloOptions, base: nn.Module, backbone: Backbone) -> int:
    """Those of them that are the router's."""
    linears = placed(adapted_linears(base, backbone), backbone, options.linears, options.projector)
    return router_parameter_count(adapter_config(options, base, backbone), linears)
