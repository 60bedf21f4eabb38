"""Sizes at equal trainable parameters: what one method trains, another is given."""

from typing import Annotated, Literal, cast

from pydantic import Field
from torch import nn

from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.methods.base import Method
from delo_llava.registry import load_plugin

#: An option: a number of things, or as many as come nearest to another method's size.
Matched = Literal["match"] | Annotated[int, Field(ge=1)]


def stage_parameters(name: str, base: nn.Module, backbone: Backbone, run: RunConfig) -> int:
    """Trainable parameters of a stage of the method `name`, with its options in this run."""
    kind = cast(type[Method], load_plugin("method", name))
    method = kind(kind.Config(**run.methods.get(name, {})), run, backbone)
    return method.footprint(base).parameters


def matched_count(
    like: str, base: nn.Module, backbone: Backbone, run: RunConfig, each: int, besides: int = 0
) -> int:
    """How many things of `each` parameters, with `besides` further ones, come nearest to what a stage of the
    method `like` trains; at least one.
    """
    return max(1, round((stage_parameters(like, base, backbone, run) - besides) / each))


def matched_rank(
    like: str, base: nn.Module, backbone: Backbone, run: RunConfig, besides: int = 0, each: int = 0
) -> int:
    """The rank r whose r·(Σ(d_in + d_out) + `each`), with `besides` further parameters, is nearest to what a
    stage of the method `like` trains.
    """
    widths = sum(i + o for i, o in adapted_linears(base, backbone).values())
    return matched_count(like, base, backbone, run, widths + each, besides)
