"""What the LoRA baselines share: the adapter, its rank at equal trainable parameters, its files."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from delo_llava.backbones.base import Backbone, adapted_linears
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError
from delo_llava.methods._lowrank import ADAPTER, LowRankOptions
from delo_llava.methods._size import matched_rank
from delo_llava.methods.base import Footprint, Method, Stage


def lora_config(options: LowRankOptions, base: nn.Module, backbone: Backbone, run: RunConfig) -> LoraConfig:
    """PEFT's configuration for every language and projector linear, like DeLo's."""
    rank = matched_rank(options.like, base, backbone, run) if options.rank == "match" else options.rank
    if rank < 1:
        raise DeloError(
            "A LoRA rank must be at least 1", given=rank, fix="set rank to a positive number or to match"
        )
    pattern = f"(?:{backbone.language_pattern})|(?:{backbone.projector_pattern})"
    # PEFT's type says int, but it only ever divides alpha by r.
    alpha: Any = options.alpha_over_rank * rank
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=options.dropout, target_modules=pattern, bias="none"
    )


class LoraMethod(Method):
    """The common ground of methods that train one PEFT LoRA adapter in a stage."""

    Config = LowRankOptions

    def fresh(self, base: nn.Module) -> PeftModel:
        """A new adapter, zero at the start (B = 0), on the frozen base."""
        return get_peft_model(
            base, lora_config(self.options, base, self.backbone, self.run), adapter_name=ADAPTER
        )

    def footprint(self, base: nn.Module) -> Footprint:
        rank = lora_config(self.options, base, self.backbone, self.run).r
        widths = sum(i + o for i, o in adapted_linears(base, self.backbone).values())
        return Footprint(rank * widths, "lora", rank, 0, every_task=self.capabilities.isolated)

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        model.save_pretrained(folder, safe_serialization=True, selected_adapters=[ADAPTER])
        # PEFT writes the folder the base came from into the model card and config; a path of one machine
        # helps no other.
        (folder / "README.md").unlink(missing_ok=True)


def bare(base: nn.Module) -> nn.Module:
    """The base itself, for the zero-shot row."""
    return base.requires_grad_(False)


def no_grad_parameters(model: nn.Module) -> nn.Module:
    """Freeze everything: inference needs no gradient."""
    for parameter in model.parameters():
        if torch.is_floating_point(parameter):
            parameter.requires_grad_(False)
    return model
