"""How a sample finds its experts: queries from frozen features, the router, the plan of one forward, the task
keys.

Nothing here knows PEFT or a model family; everything is plain torch. `delo_llava.experts` imports from here,
never the other way.
"""

from delo_llava.routing.cross_modal import CrossModal, RidgeStatistics
from delo_llava.routing.plan import RouteInputs, RoutePlan
from delo_llava.routing.queries import Queries
from delo_llava.routing.router import Router, Selection
from delo_llava.routing.task_keys import TaskKeyMemory

__all__ = [
    "CrossModal",
    "Queries",
    "RidgeStatistics",
    "RouteInputs",
    "RoutePlan",
    "Router",
    "Selection",
    "TaskKeyMemory",
]
