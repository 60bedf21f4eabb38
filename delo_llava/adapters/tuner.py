"""What PEFT tuners of ours share: which linears they wrap, the carrier of a forward, fp32 adapters."""

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from delo_llava.adapters.carrier import Carrier
from delo_llava.adapters.unmergeable import PER_SAMPLE
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries


class CannotMerge(DeloError, NotImplementedError):
    """Adapters that only work beside their weights were asked to be folded into them."""


@dataclass
class LinearsConfig(PeftConfig):
    """Which linears of a vision-language model are wrapped.

    Attributes:
        target_modules: regular expression (full match) of the language layers' linears.
        projector_modules: the same for the projector's linears.
        projector: name of the projector module.
        hidden_size: width of the language model, the length of a query.
    """

    target_modules: str | None = None
    projector_modules: str | None = None
    projector: str = ""
    hidden_size: int = 0

    def is_projector(self, name: str) -> bool:
        """Whether a module's name is one of the projector's wrapped linears."""
        return bool(self.projector_modules) and re.fullmatch(self.projector_modules or "", name) is not None

    def is_target(self, name: str) -> bool:
        """Whether a module's name is wrapped at all."""
        return self.is_projector(name) or re.fullmatch(self.target_modules or "", name) is not None


class CarriedLayer(nn.Module, BaseTunerLayer):
    """A frozen linear with what adapters add to it.

    Args:
        base_layer: `nn.Linear` or a 4-bit linear.
        carrier: shared by all layers of the model; holds what was decided for a forward.
        projector: inside the projector, where rows are images.
    """

    def __init__(self, base_layer: nn.Module, carrier: Carrier, projector: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.carrier, self.projector = carrier, projector
        linear: Any = base_layer
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)

    @abstractmethod
    def update_layer(self, name: str, config: Any) -> None:
        """Add what adapter `name` needs here."""

    @property
    def acts(self) -> bool:
        """Whether there are adapters that are switched on."""
        return bool(self.active_adapters) and not self.disable_adapters

    @property
    def beside(self) -> tuple[str, str]:
        """Why PEFT does not fold its adapters into the weight, and what to do instead."""
        return PER_SAMPLE

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not there.

        Raises:
            CannotMerge: always, with the reason and a remedy.
        """
        why, fix = self.beside
        raise CannotMerge(f"These adapters cannot be merged: {why}.", given=type(self).__name__, fix=fix)

    def unmerge(self) -> None:
        """Nothing to undo, as nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter's parts, but keep them fp32 (PEFT would cast them to the base's type)."""
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for name in self.adapter_layer_names:
            parts: Any = getattr(self, name)
            if adapter_name in parts and target is not None:
                place(parts[adapter_name], target)


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module, unless it is only announced: what lies on the meta device comes with a file."""
    if all(tensor.device.type != "meta" for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)


class CarriedTuner(BaseTuner):
    """A tuner whose layers read the decisions of a carrier."""

    tuner_layer_cls: Any  # the class of its layers, a CarriedLayer
    target_module_mapping: dict[str, list[str]] = {}
    carrier: Carrier

    @abstractmethod
    def decide(self, inputs: RouteInputs, queries: Queries) -> Any:
        """What layers read, for the rows of a forward."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every target linear; the first one brings the carrier."""
        first = "carrier" not in self.__dict__
        if first:
            self.carrier = Carrier(self.decide, self._enabled)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if first:
            config: Any = self.peft_config[adapter_name]
            self.carrier.attach(model, config.projector)  # image queries are made there, adapted or not

    def _check_merge_allowed(self) -> None:
        for layer in sum(self.layers(), start=list[Any]()):
            layer.merge()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """The bare base, which knows nothing of adapters any more and can be wrapped again."""
        base = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self.carrier.detach()
        return base

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return bool(peft_config.is_target(key))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        if not hasattr(target, "in_features"):
            raise DeloError(
                "Adapters wrap linear layers only",
                given=f"{current_key}: {type(target).__name__}",
                fix="narrow target_modules",
            )
        layer = self.tuner_layer_cls(target, self.carrier, peft_config.is_projector(current_key))
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def layers(self) -> tuple[list[Any], list[Any]]:
        """The wrapped linears of the language model and of the projector, each in the model's order."""
        found = [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]
        return [m for m in found if not m.projector], [m for m in found if m.projector]

    def layer_names(self) -> tuple[list[str], list[str]]:
        """Names of the linears behind `layers`, within the frozen model."""
        found = [(n, m) for n, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)]
        return [n for n, m in found if not m.projector], [n for n, m in found if m.projector]

    def _enabled(self) -> bool:
        wrapped = (m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls))
        layer: Any = next(wrapped, None)
        return layer is not None and bool(layer.acts)
