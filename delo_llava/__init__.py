"""DeLo experts for vision-language models: continual learning of task sequences with missing modalities.

`train`, `evaluate`, `open_run` and `load_base` are what the commands do, as functions (`delo_llava.api`).
Importing this package costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delo_llava.api import evaluate as evaluate
    from delo_llava.api import load_base as load_base
    from delo_llava.api import open_run as open_run
    from delo_llava.api import train as train

__version__ = "0.1.0"
__all__ = ["evaluate", "load_base", "open_run", "register", "train"]


def register() -> None:
    """Make PEFT know every method's adapters: `PeftModel.from_pretrained(base, folder)` then opens them."""
    from delo_llava.registry import load_plugin, plugin_names

    for name in plugin_names("method"):
        load_plugin("method", name)


def __getattr__(name: str) -> Any:
    """The functions of `delo_llava.api`, imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from delo_llava.registry import load_unfollowed

    found: Any = getattr(load_unfollowed("delo_llava.api"), name)
    return found
