"""DeLo experts for vision-language models: continual learning of task sequences with missing modalities.

Importing this package costs next to nothing. It makes PEFT know the tuner type "DELO" as soon as PEFT itself
is imported (or now, if it is already), so that `PeftModel.from_pretrained(base, folder)` opens our adapters.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"


class _BesidePeft(MetaPathFinder):
    """Finds PEFT as everybody else does, with a loader that registers our tuner after it."""

    searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """PEFT's spec with our loader around its own; None for every other module."""
        if name != "peft" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Runs PEFT by its own loader, then imports our experts, which register themselves."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As PEFT's loader does."""
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """PEFT first, with its own loader back in place, then ours."""
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        importlib.import_module("delo_llava.experts")


if "peft" in sys.modules:
    importlib.import_module("delo_llava.experts")
else:
    sys.meta_path.insert(0, _BesidePeft())
