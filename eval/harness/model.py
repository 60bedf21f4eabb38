"""A stored run with its method and base, and its model after one of its stages."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

from delo_eval.answers.code import plugin_module
from delo_eval.harness.folder import AS_STORED, Request, RunFolder, open_folder
from delo_eval.harness.generate import Answerer, loaded
from delo_llava.backbones.base import Backbone, Parts, find_backbone
from delo_llava.config import with_methods
from delo_llava.methods.base import Method, Past
from delo_llava.registry import load_plugin


@dataclass
class StoredRun(RunFolder):
    """A run's folder with what it takes to answer."""

    backbone: Backbone
    model_path: str
    method: Method

    @cached_property
    def processor(self) -> Parts:
        """The base's tokenizer, image processor and dialogue."""
        return self.backbone.load_processor(self.model_path, self.config.data.limits)

    @property
    def plugins(self) -> tuple[str, str]:
        """The modules (or folders) of the method and the backbone."""
        return (
            plugin_module("method", type(self.method).__module__),
            plugin_module("backbone", type(self.backbone).__module__),
        )

    def past(self, stage: int) -> dict[str, Past]:
        """The finished stages up to `stage`, as `Method.load` takes them.

        Raises:
            DeloError: see `RunFolder.adapters`.
        """
        tasks = {task.name: task for task in self.sequence.tasks}
        done = zip(self.plan.stages, self.adapters(stage).values(), strict=False)
        return {
            planned.name: Past(folder, tuple(tasks[name] for name in planned.tasks))
            for planned, folder in done
        }


def open_run(run_dir: Path, request: Request = AS_STORED) -> StoredRun:
    """Read a run's stored configuration and find its method and base; no model is loaded.

    Raises:
        DeloError: no run there, data or model gone, or an impossible request.
    """
    found = open_folder(run_dir, request)
    config = with_methods(found.config)
    backbone, path = find_backbone(config.model)
    kind = cast(type[Method], load_plugin("method", config.method))
    method = kind(kind.Config(**config.methods.get(config.method, {})), config, backbone)
    return StoredRun(
        found.store, config, found.sequence, found.plan, found.output, found.patterns,
        backbone, path, method,
    )  # fmt: skip


def answerer(
    run: StoredRun, stage: int, device: torch.device, rooms: Mapping[str, int] | None = None
) -> AbstractContextManager[Answerer]:
    """The run's model after `stage`, loaded for answering and freed at the end.

    Args:
        rooms: most tokens of an answer by task; by default, of the run's own tasks.
    """
    return loaded(
        run.config, run.backbone, run.model_path, run.processor, run.method, run.past(stage),
        run.plan.seen(stage), device, run.sequence.rooms if rooms is None else rooms,
    )  # fmt: skip
