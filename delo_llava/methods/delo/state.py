"""What the layers of one model share during a forward: the plan, and where in the sequence the forward
stands."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from delo_llava.errors import DeloError
from delo_llava.methods.delo.plan import RouteInputs, RoutePlan


@dataclass
class Route:
    """One `routing` context.

    Attributes:
        inputs: what the caller said of the batch.
        plan: the decision, once made.
        offset: positions that the key-value cache held when the running forward began.
        inside: a forward of the whole model is running; early: the plan was made before it began.
    """

    inputs: RouteInputs
    plan: RoutePlan | None = None
    offset: int = 0
    inside: bool = False
    early: bool = False


@dataclass
class RouteState:
    """A stack of routes (a teacher's forward may lie inside a student's), and a switch for frozen
    features."""

    stack: list[Route] = field(default_factory=list)
    suspended: bool = False

    @property
    def offset(self) -> int:
        """Positions already in the key-value cache."""
        return self.stack[-1].offset

    def current(self) -> RoutePlan:
        """The plan in force.

        Raises:
            DeloError: outside `routing`, or before the plan was made.
        """
        if not self.stack or (plan := self.stack[-1].plan) is None:
            raise self.missing_plan()
        return plan

    def missing_plan(self) -> DeloError:
        """The error for a forward that no plan covers."""
        if not self.stack:
            return DeloError(
                "Experts are active, but nothing says how to route",
                fix="call the model inside `with routing(model, inputs):`",
            )
        images = len(self.stack[-1].inputs.image_rows)
        return DeloError(
            "Routing and the model's inputs disagree on the images",
            given=f"{images} images announced to routing",
            fix="take pixel values, image_rows and image_tokens from the same batch",
        )

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

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For `torch.utils.checkpoint(context_fn=…)`: the recomputation, which may come after other
        forwards, gets
        this plan."""
        if not self.stack:
            return nullcontext(), nullcontext()
        now = self.stack[-1]
        return nullcontext(), self.entered(Route(now.inputs, now.plan, now.offset))


ContextFn = Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]]
