"""The PEFT tuner: injects expert layers, owns the routers, and decides the plan once per forward.

When a forward enters the model under `routing`, the plan is made before the projector's experts act: from the
frozen projector's output for the image, from frozen word embeddings for the text. With no image in the batch
it is made on entry.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from delo_llava.data.segments import SEGMENT_CONTEXT, SEGMENT_INSTRUCTION
from delo_llava.errors import DeloError
from delo_llava.features.queries import Queries, image_mean, segment_mean
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.cross_modal import CrossModal
from delo_llava.methods.delo.layer import DeloLayer
from delo_llava.methods.delo.plan import RouteInputs, RoutePlan
from delo_llava.methods.delo.router import Router, Selection
from delo_llava.methods.delo.state import ContextFn, Route, RouteState

#: Fields that may differ between the adapters of one model.
FREE_FIELDS = {
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "revision",
    "task_type",
}


class DeloModel(BaseTuner):
    """DeLo experts around a frozen vision-language model; one adapter per task."""

    prefix = "delo_"
    tuner_layer_cls = DeloLayer
    target_module_mapping: dict[str, list[str]] = {}

    # ---- injection
    # ------------------------------------------------------------------------------------------------
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: pools in every target linear, its router and its cross-modal map."""
        if "delo_router" not in self._modules:
            self.state = RouteState()
            self.delo_router, self.delo_cross = nn.ModuleDict(), nn.ModuleDict()
        config: Any = self.peft_config[adapter_name]
        self._check_adapter(model, adapter_name, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        language, projector = self.layers()
        if not self.delo_router:
            for group in (language, projector):
                for slot, layer in enumerate(group):
                    layer.slot = slot
            model.register_forward_pre_hook(self._enter, with_kwargs=True)
            model.register_forward_hook(self._leave, always_call=True)
            if projector:
                model.get_submodule(config.projector).register_forward_pre_hook(
                    self._at_projector, with_kwargs=True
                )
        self.delo_router[adapter_name] = _router(config, language, projector).to(self._device())
        self.delo_cross[adapter_name] = CrossModal(config.cross_modal, config.hidden_size, config.latent).to(
            self._device()
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
        if isinstance(target, DeloLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not hasattr(target, "in_features"):
            raise DeloError(
                "Experts wrap linear layers only",
                given=f"{current_key}: {type(target).__name__}",
                fix="narrow target_modules",
            )
        layer = DeloLayer(target, self.state, peft_config.is_projector(current_key))
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def layers(self) -> tuple[list[DeloLayer], list[DeloLayer]]:
        """The expert layers of the language model and of the projector, each in the model's order."""
        found = [m for m in self.model.modules() if isinstance(m, DeloLayer)]
        return [m for m in found if not m.projector], [m for m in found if m.projector]

    def layer_names(self) -> tuple[list[str], list[str]]:
        """Names of the linears behind `layers`, within the frozen model."""
        found = [(name, m) for name, m in self.model.named_modules() if isinstance(m, DeloLayer)]
        return [n for n, m in found if not m.projector], [n for n, m in found if m.projector]

    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    # ---- which adapter
    # --------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one; its pools, router and learned map require gradients unless
        `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
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
    def _enabled(self) -> bool:
        return not next(m for m in self.model.modules() if isinstance(m, DeloLayer)).disable_adapters

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins: a fresh plan, unless it continues from a cache."""
        if self.state.suspended or not self._enabled():
            return
        if not self.state.stack:
            raise self.state.missing_plan()
        route = self.state.stack[-1]
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and len(ids) != route.inputs.rows:
            raise DeloError(
                "Routing and the model disagree on the number of rows",
                given=f"{route.inputs.rows} and {len(ids)}",
                fix="give `expand` = number of beams to RouteInputs",
            )
        cache = kwargs.get("past_key_values")
        route.offset = 0 if cache is None else int(cache.get_seq_length())
        if route.offset == 0:
            images = len(route.inputs.image_rows)
            if not images:
                route.plan = self._decide(route.inputs, None)
            elif not route.early and kwargs.get("pixel_values") is not None:
                route.plan = None  # the projector's hook makes it; without pixels, features were made before
            if route.plan is not None and len(route.plan.tasks) != route.inputs.rows:
                rows = torch.arange(len(route.inputs.input_ids), device=route.inputs.input_ids.device)
                route.plan = route.plan.index_select(rows.repeat_interleave(route.inputs.expand))
        route.early, route.inside = False, True

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.state.stack:
            self.state.stack[-1].inside = False

    def _at_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Images reach the projector: its frozen output gives the image queries, and so the plan."""
        if self.state.suspended or not self.state.stack or not self._enabled():
            return
        with torch.no_grad(), self.state.frozen():
            features = module.forward(*args, **kwargs)
        route = self.state.stack[-1]
        route.plan = self._decide(route.inputs, features)
        route.early = not route.inside  # `generate` encodes images before its first forward

    def queries(self, inputs: RouteInputs, features: Tensor | None) -> Queries:
        """Frozen queries of a batch; `features` is the frozen projector's output, packed or N×T×d, or None
        without
        images.

        Raises:
            DeloError: when images and features disagree, or a row's image is said to be present and none is
                given.
        """
        with torch.no_grad():
            embed: nn.Module = self.model.get_input_embeddings()
            text, instruction = (
                segment_mean(embed, inputs.input_ids, inputs.segments, segment)
                for segment in (SEGMENT_CONTEXT, SEGMENT_INSTRUCTION)
            )
            lengths = inputs.image_tokens.tolist()
            tokens = 0 if features is None else features.shape[:-1].numel()
            if sum(lengths) != tokens:
                raise DeloError(
                    "image_tokens does not add up to the projector's output",
                    given=f"{sum(lengths)} and {tokens} tokens",
                )
            image = (
                torch.zeros_like(text)
                if features is None
                else image_mean(features, lengths, inputs.image_rows, len(text))
            )
            if bool((inputs.presence[:, 0] & (image == 0).all(1)).any()):
                raise DeloError(
                    "A row is marked as having an image, but none is given",
                    fix="take presence and pixel values from one batch",
                )
        return Queries(image, text, instruction)

    def _decide(self, inputs: RouteInputs, features: Tensor | None) -> RoutePlan:
        queries = self.queries(inputs, features)
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
            projector_slots=len(self.layers()[1]),
            own_tokens=config.scope == "own",
            lengths=inputs.image_tokens.tolist(),
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
        return image, [w[config.pool_size :] for w in weights[len(projector) :]]


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
    """The DeLo tuner inside a PEFT model, however an engine wraps it."""
    inner: Any = model
    while inner is not None and not isinstance(inner, DeloModel):
        inner = inner._modules.get("base_model", inner._modules.get("module"))
    if inner is None:
        raise DeloError(
            "This model has no DeLo experts",
            given=type(model).__name__,
            fix="wrap it with peft.get_peft_model and a DeloConfig",
        )
    return inner


@contextmanager
def routing(model: nn.Module, inputs: RouteInputs) -> Iterator[Route]:
    """Route every forward (or one `generate`) inside by `inputs`; the plan is on the yielded object after the
    forward."""
    with tuner(model).state.entered(Route(inputs)) as route:
        yield route


def checkpoint_context_fn(model: nn.Module) -> ContextFn:
    """`context_fn` for non-reentrant gradient checkpointing, so that recomputed blocks use the plan of their
    first pass."""
    return tuner(model).state.checkpoint_contexts


def frozen_queries(model: nn.Module, inputs: RouteInputs, model_inputs: Mapping[str, Any]) -> Queries:
    """Queries of a batch without running the language model (to fit maps and keys, or to choose tasks
    beforehand).

    Args:
        model: a PEFT model with experts.
        inputs: as for `routing`; `model_inputs`: the batch's inputs, of which the image tensors are used.
    """
    delo = tuner(model)
    features = None
    if len(inputs.image_rows):
        visual = {k: model_inputs[k] for k in ("pixel_values", "image_grid_thw") if k in model_inputs}
        with torch.no_grad(), delo.state.frozen():
            features = torch.cat(list(delo.model.get_image_features(**visual).pooler_output))
    return delo.queries(inputs, features)


def set_trainable(model: nn.Module, task: str) -> None:
    """Let gradients flow to one task's pools, router and learned map, and to nothing else."""
    for parameter in model.parameters():
        if torch.is_floating_point(parameter):
            parameter.requires_grad_(False)
    tuner(model).set_adapter(task)
