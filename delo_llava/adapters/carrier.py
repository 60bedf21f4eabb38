"""The carrier of one forward's decisions: made once from frozen queries, read by all layers of a model.

When a forward enters the model under `routing`, the decision is made before the projector's adapters act:
from the frozen projector's output for the image, from frozen word embeddings for the text. With no image in
the batch it is made on entry. In `generate` it is made at the prefill and kept for every decode step. No
tensor carries attributes, and nothing in a decision changes while layers read it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from delo_llava.data.segments import SEGMENT_CONTEXT, SEGMENT_INSTRUCTION
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries, image_mean, segment_mean


class Decision(Protocol):
    """What a method decides for the rows of a forward; its layers read it."""

    @property
    def rows(self) -> int:
        """Number of rows, beams included."""

    def index_select(self, rows: Tensor) -> Self:
        """The decision of some rows in a new order (beams); images are behind us then."""


#: From what is known of a batch and its frozen queries to what layers read.
Decide = Callable[[RouteInputs, Queries], Any]


@dataclass
class Route:
    """One `routing` context.

    Attributes:
        inputs: what the caller said of the batch.
        plan: the decision, once made.
        offset: positions that the key-value cache held when the running forward began.
        inside: a forward of the whole model is running; early: the decision was made before it began.
    """

    inputs: RouteInputs
    plan: Any = None
    offset: int = 0
    inside: bool = False
    early: bool = False


@dataclass
class Carrier:
    """Decisions of the forwards of one model: a stack of routes (a teacher's forward may lie inside a
    student's), and a switch for frozen features.

    Attributes:
        decide: makes the decision.
        enabled: whether the layers act at all; False leaves the base alone.
        suspended: layers act as their bases.
        mix: what layers do with the decision, where methods that share a layer differ in that.
        dummy: the image that goes through the projector belongs to no row (see `dummy_image`).
    """

    decide: Decide
    enabled: Callable[[], bool] = lambda: True
    stack: list[Route] = field(default_factory=list)
    suspended: bool = False
    dummy: bool = False
    mix: Any = None
    model: Any = None
    projector: str = ""
    hooks: list[Any] = field(default_factory=list)

    def attach(self, model: nn.Module, projector: str) -> None:
        """Watch the forwards of a transformers model, and what reaches its projector (a module's name)."""
        self.model, self.projector = model, projector
        model.__dict__["carrier"] = self
        self.hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        if projector:
            inner = model.get_submodule(projector)
            self.hooks.append(inner.register_forward_pre_hook(self._at_projector, with_kwargs=True))

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.model.__dict__.pop("carrier", None)

    # ---- what layers ask
    @property
    def offset(self) -> int:
        """Positions already in the key-value cache."""
        return self.stack[-1].offset

    def current(self) -> Any:
        """The decision in force.

        Raises:
            DeloError: outside `routing`, or before the decision was made.
        """
        if not self.stack or (plan := self.stack[-1].plan) is None:
            raise self.missing_plan()
        return plan

    def missing_plan(self) -> DeloError:
        """The error for a forward that no decision covers."""
        if not self.stack and torch._C._current_graph_task_id() >= 0:  # inside a backward pass
            return DeloError(
                "Gradient checkpointing computes a block again, and how its rows were routed is gone",
                fix="give checkpointing its context: model.gradient_checkpointing_enable({'use_reentrant': "
                "False, 'context_fn': delo_llava.adapters.carrier.checkpoint_contexts(model)})",
            )
        if not self.stack:
            return DeloError(
                "Experts are active, but nothing says how to route",
                fix="call the model inside `with routing(model, inputs):`",
            )
        images = len(self.stack[-1].inputs.image_rows)
        return DeloError(
            "Routing and the model's inputs disagree on the images",
            given=f"{images} images announced to routing",
            fix="take pixel values, image_rows and image_units from the same batch",
        )

    # ---- contexts
    @contextmanager
    def entered(self, route: Route) -> Iterator[Route]:
        """Make `route` the one in force."""
        self.stack.append(route)
        try:
            yield route
        finally:
            self.stack.pop()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Layers act as their bases: for features that queries are made of."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    @contextmanager
    def dummy_image(self) -> Iterator[None]:
        """An image that belongs to no row goes through the projector, so that its parameters are used; the
        decision is made there, as with real images, and not on entry.
        """
        self.dummy = True
        try:
            yield
        finally:
            self.dummy = False

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For `torch.utils.checkpoint(context_fn=…)`: the recomputation, which may come after other forwards,
        gets this decision.
        """
        if not self.stack:
            return nullcontext(), nullcontext()
        now = self.stack[-1]
        return nullcontext(), self.entered(Route(now.inputs, now.plan, now.offset))

    # ---- hooks
    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins: a fresh decision, unless it continues from a cache."""
        if self.suspended or not self.enabled():
            return
        if not self.stack:
            raise self.missing_plan()
        route = self.stack[-1]
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
            self._begin(route, has_pixels=kwargs.get("pixel_values") is not None)
        route.early, route.inside = False, True

    def _begin(self, route: Route, has_pixels: bool) -> None:
        if not len(route.inputs.image_rows):
            # With a dummy image the projector's hook decides, in the order in which it does with real ones.
            route.plan = None if self.dummy else self.decide(route.inputs, self.queries(route.inputs, None))
        elif not route.early and has_pixels:
            route.plan = None  # the projector's hook makes it; without pixels, features were made before
        if route.plan is not None and route.plan.rows != route.inputs.rows:
            rows = torch.arange(len(route.inputs.input_ids), device=route.inputs.input_ids.device)
            route.plan = route.plan.index_select(rows.repeat_interleave(route.inputs.expand))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack:
            self.stack[-1].inside = False

    def _at_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Images reach the projector: its frozen output gives the image queries, and so the decision."""
        if self.suspended or not self.stack or not self.enabled():
            return
        route = self.stack[-1]
        features = None
        if self.dummy or route.inputs.queries is None:
            with torch.no_grad(), self.frozen():
                features = module.forward(*args, **kwargs)
        inputs, queries = route.inputs, self.queries(route.inputs, None if self.dummy else features)
        if self.dummy:
            assert features is not None
            whose = torch.zeros(1, dtype=torch.int64, device=features.device)
            inputs = replace(inputs, image_rows=whose, image_units=whose + len(features), image_kept=None)
        route.plan = self.decide(inputs, queries)
        route.early = not route.inside  # `generate` encodes images before its first forward

    # ---- frozen features
    def queries(self, inputs: RouteInputs, features: Tensor | None) -> Queries:
        """Frozen queries of a batch; `features` is the frozen projector's output, units×d or units×T×d, or
        None without images. An encoder's queries, where the inputs bring them, are taken as they are.

        Raises:
            DeloError: when images and features disagree, or a row's image is said to be present and none is
                given.
        """
        if inputs.queries is not None:
            return inputs.queries
        with torch.no_grad():
            embed: nn.Module = self.model.get_input_embeddings()
            text, instruction = (
                segment_mean(embed, inputs.input_ids, inputs.segments, segment)
                for segment in (SEGMENT_CONTEXT, SEGMENT_INSTRUCTION)
            )
            lengths = inputs.image_lengths(0 if features is None else features.shape[:-1].numel())
            image = (
                torch.zeros_like(text)
                if features is None
                else image_mean(features, lengths, inputs.image_rows, len(text), inputs.image_kept)
            )
            if bool((inputs.presence[:, 0] & (image == 0).all(1)).any()):
                raise DeloError(
                    "A row is marked as having an image, but none is given",
                    fix="take presence and pixel values from one batch",
                )
        return Queries(image, text, instruction)


ContextFn = Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]]


def find_carrier(model: nn.Module) -> Carrier | None:
    """The carrier of a model, however PEFT or an engine wraps it; None where it has none."""
    return next((m.__dict__["carrier"] for m in model.modules() if "carrier" in m.__dict__), None)


def carrier_of(model: nn.Module) -> Carrier:
    """The carrier of a model that must have one.

    Raises:
        DeloError: it has none.
    """
    found = find_carrier(model)
    if found is None:
        raise DeloError(
            "This model has no adapters that are routed",
            given=type(model).__name__,
            fix="build it with a method that routes",
        )
    return found


@contextmanager
def routing(model: nn.Module, inputs: RouteInputs) -> Iterator[Route]:
    """Decide every forward (or one `generate`) inside by `inputs`; the decision is on the yielded object
    after the forward.
    """
    with carrier_of(model).entered(Route(inputs)) as route:
        yield route


def checkpoint_contexts(model: nn.Module) -> ContextFn | None:
    """`context_fn` for non-reentrant gradient checkpointing, so that recomputed blocks use the decision of
    their first pass; None for a model that decides nothing.
    """
    carrier = find_carrier(model)
    return None if carrier is None else carrier.checkpoint_contexts


def frozen_queries(model: nn.Module, inputs: RouteInputs, model_inputs: Mapping[str, Any]) -> Queries:
    """Queries of a batch without running the language model (to fit maps and keys, or to choose tasks
    beforehand).

    Args:
        model: one with a carrier.
        inputs: as for `routing`; `model_inputs`: the batch's inputs, of which the image tensors are used.
    """
    carrier = carrier_of(model)
    features = None
    if len(inputs.image_rows) and inputs.queries is None:
        features = projector_output(carrier.model, carrier.projector, model_inputs, carrier.frozen())
    return carrier.queries(inputs, features)


def projector_output(
    model: Any, projector: str, model_inputs: Mapping[str, Any], frozen: AbstractContextManager[object]
) -> Tensor:
    """What the module named `projector` gives for a batch's images, without gradient. (Some families return
    something else from `get_image_features`: packed, with line ends, or shrunk.)
    """
    seen: list[Tensor] = []
    encode = model.get_image_features
    visual = {key: model_inputs[key] for key in signature(encode).parameters if key in model_inputs}
    hook = model.get_submodule(projector).register_forward_hook(lambda m, given, out: seen.append(out))
    try:
        with torch.no_grad(), frozen:
            encode(**visual)
    finally:
        hook.remove()
    [features] = seen
    return features
