"""The PEFT tuner: injects expert layers, owns the routers, and makes the plan of a forward."""

import re
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.adapters.tuner import CarriedTuner, place
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.cross_modal import CrossModal
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.plan import RoutePlan
from delo_llava.methods.delo.router import Router, Selection
from delo_llava.methods.delo.shared import SIBLINGS, Siblings

#: Fields that may differ between the adapters of one model.
FREE_FIELDS = {
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "revision",
    "task_type",
}


class DeloModel(CarriedTuner):
    """DeLo experts around a frozen vision-language model; one adapter per task."""

    prefix = "delo_"
    tuner_layer_cls = DeloLayer

    # ---- injection
    # ------------------------------------------------------------------------------------------------
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: pools in every target linear, its router and its cross-modal map."""
        if "delo_router" not in self._modules:
            self.delo_router, self.delo_cross = nn.ModuleDict(), nn.ModuleDict()
        config: Any = self.peft_config[adapter_name]
        self._check_adapter(model, adapter_name, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        language, projector = self.layers()
        if not self.delo_router:
            for group in (language, projector):
                for slot, layer in enumerate(group):
                    layer.slot = slot
            self._find_siblings()
        self.delo_router[adapter_name] = _router(config, language, projector)
        self.delo_cross[adapter_name] = CrossModal(config.cross_modal, config.hidden_size, config.latent)
        for parts in (self.delo_router, self.delo_cross):
            place(parts[adapter_name], self._device())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _find_siblings(self) -> None:
        """Tell language linears of one module that read the same tensor of each other."""
        for module in self.model.modules():
            for names in SIBLINGS:
                found = [getattr(module, name, None) for name in names]
                members = [layer for layer in found if isinstance(layer, DeloLayer) and not layer.projector]
                if len(members) > 1:
                    siblings = Siblings(members)
                    for layer in members:
                        layer.siblings = siblings

    def _check_adapter(self, model: nn.Module, name: str, config: DeloConfig) -> None:
        parts = {part for path, _ in model.named_modules() for part in path.split(".")} - set(
            self.delo_router
        )
        if not re.fullmatch(r"[\w-]+", name) or name in parts:
            raise DeloError(
                "A task's name must be letters, digits, _ or -, and none of the model's own module names",
                given=name,
                fix="rename the task",
            )
        for other, known in self.peft_config.items():
            mine, theirs = (
                {k: v for k, v in asdict(c).items() if k not in FREE_FIELDS} for c in (config, known)
            )
            if mine != theirs:
                differing = [
                    f"{k}: {mine[k]} here, {theirs[k]} in {other}" for k in mine if mine[k] != theirs[k]
                ]
                raise DeloError(
                    "The adapters of one model must agree",
                    given="; ".join(differing),
                    fix="use the run's own configuration",
                )

    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    # ---- which adapter
    # --------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one; its pools, router and learned map require gradients unless
        `inference_mode`.

        Raises:
            DeloError: several are named.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) > 1:
            raise DeloError(
                "One task's experts are active at a time, as a sample is routed by one router",
                given=", ".join(names),
                fix="name the active one; rows of several tasks are answered by RouteInputs(tasks=[…])",
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for group in (self.delo_router, self.delo_cross):
            for name, module in group.items():
                trained = (
                    name in names
                    and not inference_mode
                    and (group is self.delo_cross or self._config().gate != "none")
                )
                module.requires_grad_(trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        for group in (self.delo_router, self.delo_cross):
            del group[adapter_name]

    def _config(self) -> DeloConfig:
        config: Any = next(iter(self.peft_config.values()))
        assert isinstance(config, DeloConfig)  # the check on adding an adapter saw to it
        return config

    # ---- the plan
    # -------------------------------------------------------------------------------------------------
    def decide(self, inputs: RouteInputs, queries: Queries) -> RoutePlan:
        """The factors of every row, by its task's router."""
        tasks = self._tasks(inputs, queries)
        used = tuple(name for name in self.delo_router if name in set(tasks))
        if len(used) == 1:
            selection = self._select(used[0], queries, inputs.presence)
        else:
            selection = self._select_mixed(used, tasks, queries, inputs.presence)
        config = self._config()
        return RoutePlan.build(
            selection,
            inputs,
            tasks,
            used,
            queries,
            pool_size=config.pool_size,
            text_start=config.pool_starts()[0],
            projector_slots=len(self.layers()[1]),
            own_tokens=config.scope == "own",
        )

    def _tasks(self, inputs: RouteInputs, queries: Queries) -> list[str]:
        """The task of each row: given, chosen, or the active one."""
        rows = len(inputs.input_ids)
        tasks = inputs.tasks
        if tasks is None:
            tasks = (
                self.active_adapters[0] if inputs.choose is None else inputs.choose(queries, inputs.presence)
            )
        names = [tasks] * rows if isinstance(tasks, str) else list(tasks)
        for name in dict.fromkeys(names):
            if name not in self.delo_router:
                raise DeloError("No experts for this task", given=name, allowed=list(self.delo_router))
        return names

    def _select(self, task: str, queries: Queries, presence: Tensor) -> Selection:
        return Selection(*self.delo_router[task](self.delo_cross[task](queries, presence), self._pools(task)))

    def _select_mixed(
        self, used: tuple[str, ...], tasks: list[str], queries: Queries, presence: Tensor
    ) -> Selection:
        """Rows of several tasks, each by its own router (inference only: one pass per task in the batch,
        none per
        row)."""
        order, parts = [], []
        for task in used:
            rows = torch.tensor([i for i, name in enumerate(tasks) if name == task], device=presence.device)
            order.append(rows)
            parts.append(self._select(task, queries.rows(rows), presence[rows]))
        back = torch.cat(order).argsort()
        joined = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        return Selection._make(joined).rows(back)

    def _pools(self, task: str) -> tuple[list[Tensor], list[Tensor]] | None:
        """A pools for the exact conditional selection, per slot; None when it is not used."""
        config = self._config()
        if config.conditional != "factor":
            return None
        language, projector = self.layers()
        weights: list[Any] = [layer.delo_A[task].weight for layer in (*projector, *language)]
        if any(hasattr(w, "ds_id") for w in weights):
            raise DeloError(
                "conditional=factor reads all pools at once, which ZeRO-3 shards",
                given="factor",
                allowed=["table", "none"],
            )
        image = [w[: config.pool_size] for w in weights]
        return image, [w[config.pool_starts()[0] :] for w in weights[len(projector) :]]


def _router(config: DeloConfig, language: list[DeloLayer], projector: list[DeloLayer]) -> Router:
    text_widths = [layer.in_features for layer in language]
    image_widths = [layer.in_features for layer in projector] + text_widths
    return Router(
        hidden=config.hidden_size,
        latent=config.latent,
        slots=(len(image_widths), len(text_widths)),
        pool_size=config.pool_size,
        rank=config.r,
        gate=config.gate,
        temperature=config.temperature,
        conditional=config.conditional,
        widths=(image_widths, text_widths),
    )


def tuner(model: nn.Module) -> DeloModel:
    """The DeLo tuner inside a PEFT model, however an engine or a compiler wraps it."""
    inner = next((module for module in model.modules() if isinstance(module, DeloModel)), None)
    if inner is None:
        raise DeloError(
            "This model has no DeLo experts",
            given=type(model).__name__,
            fix="wrap it with peft.get_peft_model and a DeloConfig",
        )
    return inner


def set_trainable(model: nn.Module, task: str) -> None:
    """Let gradients flow to one task's pools, router and learned map, and to nothing else."""
    for parameter in model.parameters():
        if torch.is_floating_point(parameter):
            parameter.requires_grad_(False)
    tuner(model).set_adapter(task)
