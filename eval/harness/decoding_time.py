"""How long answering takes with a run's last stage, measured beside the bare base in one process.

Both models are loaded at once and answer the same batches in turn, base, last stage, base: a pair of times is
taken within a moment, so what else the machine does falls on both, and compared with the mean of the base's.
The base's second answer ÷ its first is the control: it shows what the measurement itself is worth. Every
answer has the task's whole number of tokens, as a base that stops later than a trained model would tell
nothing of a token. The choice of the task counts, as it does in real use; reading pictures and tokenising,
the same for both, do not.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from delo_eval.answers.question import Question
from delo_eval.harness.generate import Answerer, batches, decoding
from delo_eval.harness.model import StoredRun, answerer, open_run
from delo_eval.harness.questions import Cell, Questions
from delo_eval.matrix.accuracy import RUN_PATTERN, ZERO_SHOT
from delo_eval.matrix.general import adapters_of
from delo_llava.backbones.base import resolve_device
from delo_llava.data.collate import Batch
from delo_llava.errors import DeloError

SCHEMA = "delo-llava/decoding/1"
ROUNDS = 5


def measure(run_dir: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time of answering with the last stage ÷ that of the bare base: the median of paired ratios.

    Args:
        rounds: how often each task's batch is answered by both; one more round before them is not counted.

    Returns:
        `ratio` and `control` (base ÷ base) with `median`, `low` and `high` (quartiles of the pairs), and what
        was measured.

    Raises:
        DeloError: no such run, or nothing of it is trained.
    """
    run = open_run(run_dir)
    if run.plan.last == ZERO_SHOT:
        raise DeloError("Nothing is trained in this run: its result is the base.", given=run_dir)
    device = resolve_device(run.config.device)
    with ExitStack() as stack:
        # A method may keep what it loaded, so each model has its own.
        opened = ((run, ZERO_SHOT), (open_run(run_dir), run.plan.last))
        base, last = (stack.enter_context(answerer(own, stage, device)) for own, stage in opened)
        asked = [
            (task.max_new_tokens, _batch_of(run, Cell(task, RUN_PATTERN))) for task in run.sequence.tasks
        ]
        pairs = [
            _pair(base, last, questions, tokens) for _ in range(rounds + 1) for tokens, questions in asked
        ]
    counted = pairs[len(asked) :]
    return {
        "schema": SCHEMA,
        "ratio": _summary([2 * last / (first + again) for first, last, again in counted]),
        "control": _summary([again / first for first, _, again in counted]),
        "base_seconds": statistics.median(first for first, _, _ in counted),
        "pairs": len(counted),
        "batch_size": run.config.eval.batch_size,
        "tokens": sorted({tokens for tokens, _ in asked}),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "adapters": adapters_of(run.store, run.plan, run.plan.last),
    }


def _batch_of(run: StoredRun, cell: Cell) -> Sequence[Question]:
    """The first batch of a task's questions, as an evaluation makes it."""
    return batches(Questions(run.config).of(cell), run.config.eval.batch_size)[0]


def _pair(
    base: Answerer, last: Answerer, questions: Sequence[Question], tokens: int
) -> tuple[float, float, float]:
    """Seconds of the base, of the last stage and of the base again, on one batch."""
    batch = base.collate([(q.record, q.presence) for q in questions]).to(base.device)
    tasks = [q.record.task for q in questions]
    first, other, again = (_seconds(ready, batch, tasks, tokens) for ready in (base, last, base))
    return first, other, again


@torch.inference_mode()
def _seconds(ready: Answerer, batch: Batch, tasks: Sequence[str], tokens: int) -> float:
    """Time to answer a batch, choice of the task included, until all its work is done."""
    settings = decoding(ready.tokenizer, ready.model, tokens, ready.beams, ready.ends)
    settings.min_new_tokens = tokens
    can = ready.method.capabilities
    used: Sequence[str] | None = None
    _wait(ready.device)
    began = time.perf_counter()
    if ready.trained and can.chooses_task:
        choice = ready.method.choose(ready.model, batch, None)
        used = None if choice is None else choice.names
    elif ready.trained and can.needs_task:
        used = tasks
    with ready.method.answering(ready.model, batch, used, ready.beams) as prompt:
        cast(Any, ready.model).generate(**prompt.inputs, generation_config=settings)
    _wait(ready.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(ratios: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
