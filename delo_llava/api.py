"""What the command line does, as functions: `from delo_llava import train, evaluate, open_run, load_base`.

Settings are those of `delo-llava train --help`, with the same names and the same checks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delo_llava.schema import flat

if TYPE_CHECKING:
    from delo_eval.harness.saved import SavedStage
    from delo_llava.backbones.base import Backbone


def train(settings: Mapping[str, Any] | None = None, /, **more: Any) -> Path:
    """Train a task sequence in this process and evaluate after each task; goes on where it was stopped.

        train(task_seq="mini6", method="delo", output="runs/x", missing={"ratio": 0.7}, zero="none")

    Args:
        settings: nested (`{"train": {"lr": 1e-3}}`) or dotted (`{"train.lr": 1e-3}`); `more` lies over them.
            A method's options are a section of its name.

    Returns:
        the run's folder.

    Raises:
        DeloError: an unknown key or value, and whatever is wrong with data, base or folder.
        Preempted: this process got a signal to leave; what was done is saved.
    """
    from delo_eval.harness.run import evaluate_stage
    from delo_llava.cli import planned_bytes, resolve
    from delo_llava.runs.job import make_job
    from delo_llava.runs.sequence import run_sequence

    config = resolve(_words({**(settings or {}), **more}))
    return run_sequence(make_job(config), evaluate_stage, planned_bytes).parent


def evaluate(run: Path | str, stage: str | int = "all", **request: Any) -> dict[str, Any]:
    """Evaluate stages of a stored run, as `delo-eval` does, without its tables.

    Args:
        stage: an index from 0, a task's name, `last`, `all` or `zero-shot`.
        request: what differs from the run's own settings (`delo_eval.harness.folder.Request`): `split="val"`,
            `limit=100`, `patterns=("run", "image")`, `wording="…"`, `output=Path(…)`, `cache=False`.

    Returns:
        the content of results.json.

    Raises:
        DeloError: no such run or stage, or one that cannot be evaluated as asked.
    """
    from delo_eval.harness.folder import Request
    from delo_eval.harness.run import evaluate_stages

    content = evaluate_stages(Path(run), str(stage), Request(**request), quiet=True)
    assert content is not None  # one process is the first rank
    return content


def open_run(
    run: Path | str, stage: str | int = "last", task: str | None = None, device: str | None = None
) -> "SavedStage":
    """A run's model after one stage, which answers by itself; use it in a `with`, or `close` it.

        with open_run("runs/x") as model:
            print(model.answer("Which animal is it?", image="cat.png", context="Seen in 2021."))

    Args:
        stage: an index from 0, a task's name, `last`, or `zero-shot`.
        task: to answer as; without it the method chooses one for every question.
        device: `auto`, `cpu`, `cuda` or `cuda:1`; by default what the run's configuration says.

    Raises:
        DeloError: no such run, stage or task, or a method that needs the task without one.
    """
    from delo_eval.harness.saved import SavedStage

    return SavedStage(run, stage, task, device)


def load_base(
    model: str = "mini-llava",
    *,
    quant: str = "nf4",
    dtype: str = "auto",
    attn: str = "auto",
    device: str = "auto",
) -> tuple[Any, Any, "Backbone"]:
    """A frozen base as methods get it.

    Args:
        model: a shipped model's name, a checkpoint folder, or a hub id.
        quant, dtype, attn, device: as the settings of the same names.

    Returns:
        the model (in evaluation mode), its processor, and what is known of its family.

    Raises:
        DeloError: no such model, one of an unknown family, or an unknown choice.
    """
    from delo_llava.backbones.base import find_backbone

    backbone, path = find_backbone(model)
    loaded = backbone.load(path, quant=quant, dtype=dtype, attn=attn, device=device)  # type: ignore[arg-type]
    return loaded, backbone.load_processor(path), backbone


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line has them."""
    return [f"--{key}={_text(value)}" for key, value in flat(dict(settings)).items()]


def _text(value: Any) -> str:
    """A value as a word: text and paths as they are, all else as JSON, which is YAML."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
