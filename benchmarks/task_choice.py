"""Processor time of DeLo's statistics at a 7B model's width: how they were taken until now, and as they are.

    python benchmarks/task_choice.py                       # d = 4096, 8 samples a step, 32 questions a batch
    python benchmarks/task_choice.py --threads 8 --step_seconds 4.4

Before: a d×d product for every micro-batch and view, a Cholesky factor for every batch of questions. As they
are: `TaskKeyMemory` and `RidgeStatistics`. Both see the same rows, and what they give is compared. Prints a
table to stderr and JSON to stdout; exits 1 where a share of the step or the batch is above `--limit`.

The step and the batch that the shares are of are stated, not measured (7.06 B parameters, an H100 at 400
TFLOP/s): a step of 8 samples of 2,048 tokens with recomputation and a frozen base takes 6 operations a
parameter and token, 1.7 s; 32 questions of 1,000 tokens take 1.1 s to read, and 16 answer tokens .6 s.
A slower GPU makes the shares smaller.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from delo_llava.features.queries import VIEWS, Queries
from delo_llava.features.ridge import RidgeStatistics
from delo_llava.features.task_keys import KeyStatistics, TaskKeyMemory


class Before:
    """The same statistics without blocks, and the same choice without anything kept."""

    def __init__(self, hidden: int, shrinkage: float = 0.1) -> None:
        self.hidden, self.shrinkage = hidden, shrinkage

    def observe(self, sums: KeyStatistics, queries: Queries) -> None:
        """Three d×d products for one micro-batch."""
        assert sums.products is not None
        for view, query in enumerate(queries):
            rows = query.double()
            sums.count[view] += len(rows)
            sums.sums[view] += rows.sum(0)
            sums.products[view] += rows.T @ rows

    def ridge(self, statistics: RidgeStatistics, queries: Queries) -> None:
        """Three d×d products for one micro-batch."""
        image, text = queries.image.double(), queries.text.double()
        statistics.count += len(image)
        statistics.sums += torch.stack([image.sum(0), text.sum(0)])
        statistics.products += torch.stack([image.T @ image, text.T @ text, image.T @ text])

    def choose(self, tasks: list[KeyStatistics], queries: Queries) -> Tensor:
        """Log-likelihoods B×T, from a factor that is made anew."""
        scores = torch.zeros(len(queries.image), len(tasks), dtype=torch.float64)
        for view, query in enumerate(queries):
            means = torch.stack([task.means()[view] for task in tasks])
            count = torch.stack([task.count[view] for task in tasks])
            scatter = torch.stack([task.scatter(view) for task in tasks]).sum(0)
            covariance = scatter / (count.sum() - len(tasks)).clamp(min=1)
            spread = covariance.diagonal().mean()
            eye = torch.eye(self.hidden, dtype=torch.float64)
            factor = torch.linalg.cholesky((1 - self.shrinkage) * covariance + self.shrinkage * spread * eye)
            both = torch.cat([query.double(), means]).T
            white = torch.linalg.solve_triangular(factor, both, upper=False).T
            samples, centres = white[: len(query)], white[len(query) :]
            distances = torch.cdist(samples, centres, compute_mode="donot_use_mm_for_euclid_dist")
            scores -= 0.5 * distances**2
        return scores


def drawn(rows: int, hidden: int, task: int, seed: int) -> Queries:
    """Queries of length one around a task's own directions."""
    centres = torch.randn(3, hidden, generator=torch.Generator().manual_seed(task))
    draw = torch.Generator().manual_seed(seed)
    return Queries(
        *(F.normalize(centre + 2 * torch.randn(rows, hidden, generator=draw), dim=1) for centre in centres)
    )


def seconds(work: Callable[[], Any], rounds: int = 1) -> float:
    """Processor seconds of one round."""
    began = time.process_time()
    for _ in range(rounds):
        work()
    return (time.process_time() - began) / rounds


def training(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the statistics of a step: keys and, apart, ridge sums (which are taken before the steps)."""
    size, hidden = args.micro_batch, args.hidden
    micros = args.step_samples // size
    before, sums = Before(hidden), KeyStatistics.empty(hidden, covariance=True)
    memory, ridge, plain = TaskKeyMemory(hidden), RidgeStatistics.empty(hidden), RidgeStatistics.empty(hidden)
    there = torch.ones(size, 2, dtype=torch.bool)
    batches = [drawn(size, hidden, 0, seed) for seed in range(args.samples // size)]
    few = batches[: args.rounds]

    def spent(work: Callable[[Queries], object], over: list[Queries]) -> float:
        total: float = sum(seconds(partial(work, q)) for q in over)
        return int(micros) * total

    found = {
        "keys, before": spent(lambda q: before.observe(sums, q), few) / len(few),
        "ridge, before": spent(lambda q: before.ridge(plain, q), few) / len(few),
        "keys": spent(lambda q: memory.observe("t", q, there), batches),
        "ridge": spent(lambda q: ridge.observe(q, there), batches),
    }
    # What waits for its block belongs to these samples, too.
    found["keys"] += micros * seconds(lambda: memory.settle("t"))
    found["ridge"] += micros * seconds(ridge.tensors)
    return found | {name: found[name] / len(batches) for name in ("keys", "ridge")}


def choosing(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a batch's two choices (with and without the instruction), the first one apart, and how far
    the scores are from those made anew, up to what is the same for all tasks of a sample.
    """
    memory, names = TaskKeyMemory(args.hidden, unfamiliar=8), [f"task{i}" for i in range(args.tasks)]
    there = torch.ones(args.samples, 2, dtype=torch.bool)
    for number, name in enumerate(names):
        memory.observe(name, drawn(args.samples, args.hidden, number, 100 + number), there)
        memory.settle(name)
    queries, known = drawn(args.questions, args.hidden, 1, 7), there[: args.questions]
    views = (VIEWS, VIEWS[:2])
    scores: list[Tensor] = []

    def ours() -> None:
        scores[:] = [memory.choose(queries, known, names, "lda", seen)[1] for seen in views]

    first = seconds(ours)
    before = Before(args.hidden)
    expected: list[Tensor] = []
    once = seconds(lambda: expected.append(before.choose([memory.tasks[n] for n in names], queries)))
    found, wanted = (table - table.mean(1, keepdim=True) for table in (scores[0], expected[0]))
    if not torch.equal(scores[0].argmax(1), expected[0].argmax(1)):
        raise SystemExit("the choices differ")
    return {
        "choice, before": once * 5 / 3,  # the second choice has two views of three
        "choice, first batch": first,
        "choice": seconds(ours, args.rounds),
        "difference of scores": float((found - wanted).abs().max() / wanted.abs().max()),
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("hidden", 4096), ("tasks", 6), ("samples", 512), ("micro_batch", 4), ("step_samples", 8),
        ("questions", 32), ("rounds", 3), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, share in (("step_seconds", 1.7), ("decode_seconds", 1.7), ("limit", 0.05)):
        parser.add_argument(f"--{name}", type=float, default=share)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = training(args) | choosing(args)
    whole = {"keys": args.step_seconds, "ridge": args.step_seconds, "choice": args.decode_seconds}
    shares = {name: found[name] / of for name, of in whole.items()}
    for name, value in found.items():
        part = f"{shares[name]:9.2%}" if name in shares else ""
        sys.stderr.write(f"{name:24s} {value:12.4g}{part}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"arguments": vars(args), "found": found, "shares": shares, "peak_gib": peak}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return any(share > args.limit for share in shares.values())


if __name__ == "__main__":
    sys.exit(main())
