"""Task-key memory: running means of frozen queries per task and view, and the choice of a task per sample
(specification 5.4, 10).

Keys are true means over the samples that have the view, kept as float64 sums and counts, so they are exact
under any number of ranks and any accumulation. Only trained tasks are candidates, each sample chooses for
itself, and a missing view gives no evidence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from delo_llava.errors import DeloError
from delo_llava.features.blocks import RowBlocks
from delo_llava.features.moments import pack_half, unpack_half
from delo_llava.features.queries import VIEWS, Queries
from delo_llava.strict import read_tensors

Matcher = Literal["cosine", "lda"]
#: Queries of one view, and which rows have it.
Shown = tuple[Tensor, Tensor]
#: Random directions in which a sample's distance from the tasks is measured.
PROBES = 64
#: Samples of a view, for each of its dimensions, from which on distances tell what is unfamiliar.
ENOUGH = 4


class Stored(NamedTuple):
    """Scatters of the three views as they lie in a file (`features.moments`).

    Attributes:
        correlations: int16 3×d(d + 1)/2. deviations: float64 3×d.
    """

    correlations: Tensor
    deviations: Tensor


@dataclass
class KeyStatistics:
    """Sums over one task's samples, in float64, on the CPU.

    Attributes:
        count: 3, samples that have each view. sums: 3×d. products: 3×d×d sums of q·qᵀ, or None when no
            covariance is kept, or `stored` holds it in place of them.
    """

    count: Tensor
    sums: Tensor
    products: Tensor | None = None
    stored: Stored | None = None

    @classmethod
    def empty(cls, hidden: int, covariance: bool) -> "KeyStatistics":
        """No samples yet."""
        products = torch.zeros(3, hidden, hidden, dtype=torch.float64) if covariance else None
        return cls(torch.zeros(3, dtype=torch.float64), torch.zeros(3, hidden, dtype=torch.float64), products)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {"count": self.count, "sums": self.sums, "products": self.products}
        named |= self.stored._asdict() if self.stored else {}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def add(self, other: "KeyStatistics") -> None:
        """Sum in place: the statistics of both sets of samples together."""
        if self.stored is not None:
            means = self.means()
            outer = (n * torch.outer(mean, mean) for n, mean in zip(self.count, means, strict=True))
            self.products = torch.stack([self.scatter(view) + square for view, square in enumerate(outer)])
            self.stored = None
        for name, tensor in self.tensors().items():
            tensor += other.tensors()[name]

    def means(self) -> Tensor:
        """3×d; zero where a view was never seen."""
        return self.sums / self.count.clamp(min=1).unsqueeze(1)

    def scatter(self, view: int) -> Tensor:
        """Within-task scatter Σ(q − μ)(q − μ)ᵀ of a view: d×d."""
        if self.stored is not None:
            return unpack_half(self.stored.correlations[view], self.stored.deviations[view])
        if self.products is None:
            raise DeloError(
                "The matcher lda needs second moments", fix="keep them: TaskKeyMemory(covariance=True)"
            )
        mean = self.means()[view]
        return self.products[view] - self.count[view] * torch.outer(mean, mean)

    def file_tensors(self) -> dict[str, Tensor]:
        """What is saved: `tensors`, with second moments as `Stored`."""
        if self.products is None:
            return self.tensors()
        halves = [pack_half(self.scatter(view)) for view in range(len(self.count))]
        correlations, deviations = map(torch.stack, zip(*halves, strict=True))
        return {"count": self.count, "sums": self.sums} | Stored(correlations, deviations)._asdict()


@dataclass
class Gathered:
    """What this rank observed of a task since it was last settled: `sums`, and the rows that `products` still
    lacks, a block for each view (none where no covariance is kept)."""

    sums: KeyStatistics
    blocks: tuple[RowBlocks, ...] = field(init=False)

    def __post_init__(self) -> None:
        products = self.sums.products
        kept = () if products is None else products.unbind()
        self.blocks = tuple(RowBlocks(len(product), partial(_add_products, product)) for product in kept)


class Discriminant(NamedTuple):
    """How queries of one view speak for T tasks: score_t = w_t · (q − c) + o_t, which is the log-likelihood
    −½ (q − μ_t)ᵀ Σ⁻¹ (q − μ_t) but for what is the same for all tasks. Nothing d×d is left in it.

    Attributes:
        centre: c, d: the mean of the means μ_t. weight: T×d, Σ⁻¹ (μ_t − c). offset: T, −½ w_t · (μ_t − c).
        probes: k×d, random directions in which Σ is the identity: ‖P (q − μ)‖² estimates the distance
            (q − μ)ᵀ Σ⁻¹ (q − μ), within some 18 % for k = 64. places: T×k, P μ_t.
        usual: mean distance of a sample to its own task, as the probes measure it; infinite with few samples.
    """

    centre: Tensor
    weight: Tensor
    offset: Tensor
    probes: Tensor
    places: Tensor
    usual: Tensor

    def scores(self, query: Tensor) -> Tensor:
        """B×T."""
        return (query - self.centre) @ self.weight.T + self.offset

    def distance(self, query: Tensor) -> Tensor:
        """B: how much farther from the nearest task a query is than a training sample on average."""
        apart = (query @ self.probes.T).unsqueeze(1) - self.places
        return apart.square().sum(2).amin(1) / self.usual


class TaskKeyMemory:
    """Keys of all trained tasks.

    Args:
        hidden: d, length of a query.
        covariance: also keep second moments, for the matcher `lda` (three d×d matrices per task).
        shrinkage: share of the spherical part in the shared covariance of `lda`, in (0, 1].
        unfamiliar: with `lda`, a view of a sample that is so many times farther from the nearest task than
            training samples are on average says nothing, unless no view is nearer; 0: every view speaks. Far
            from all tasks, what a Gaussian says of them is large and means little: another wording of an
            instruction would overrule image and context.
    """

    FILE = "task_keys.safetensors"

    def __init__(
        self, hidden: int, covariance: bool = True, shrinkage: float = 0.1, unfamiliar: float = 0.0
    ) -> None:
        self.hidden, self.covariance, self.shrinkage = hidden, covariance, shrinkage
        self.unfamiliar = unfamiliar
        self.tasks: dict[str, KeyStatistics] = {}
        self._pending: dict[str, Gathered] = {}
        #: By tasks and view; a change of `tasks` drops them.
        self._discriminants: dict[tuple[tuple[str, ...], int], Discriminant] = {}

    def observe(self, task: str, queries: Queries, presence: Tensor) -> None:
        """Add a batch of a task (`presence`: bool B×2). Counts once `all_reduce_` or `settle` is called.

        A view counts where it is present in the data; a sample whose instruction has no words gives no
        instruction.
        """
        here = self._here(task)
        for view, (query, seen) in enumerate(zip(queries, _seen(queries, presence), strict=True)):
            rows = query.detach()[seen].cpu()
            here.sums.count[view] += len(rows)
            here.sums.sums[view] += rows.double().sum(0)
            if here.blocks:
                here.blocks[view].add(rows)

    def running(self, task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What this rank observed of `task` since it was last settled, for `resume`: sums by name, and by
        view the rows that the sum of products does not hold yet.
        """
        here = self._here(task)
        return here.sums.tensors(), dict(zip(VIEWS, (block.rows() for block in here.blocks), strict=False))

    def resume(self, task: str, sums: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        """Go on from `running`; rows of several ranks may be joined, their sums added up."""
        self._pending.pop(task, None)
        here = self._here(task)
        for name, tensor in here.sums.tensors().items():
            tensor.copy_(sums[name])
        for view, block in zip(VIEWS, here.blocks, strict=False):
            if view in rows:
                block.add(rows[view])

    def settle(self, task: str, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Add what was observed of `task` since the last call to its keys, summed over ranks by `reduce`.

        Every rank must call it, also one that saw no sample. Calling it twice adds nothing twice.
        """
        here = self._here(task)
        for block in here.blocks:
            block.flush()
        del self._pending[task]
        found = {name: reduce(tensor) for name, tensor in here.sums.tensors().items()}
        summed = KeyStatistics(found["count"], found["sums"], found.get("products"))
        self.tasks.setdefault(task, KeyStatistics.empty(self.hidden, self.covariance)).add(summed)
        self._discriminants.clear()

    def _here(self, task: str) -> Gathered:
        if task not in self._pending:
            self._pending[task] = Gathered(KeyStatistics.empty(self.hidden, self.covariance))
        return self._pending[task]

    def all_reduce_(self, task: str) -> None:
        """`settle` over the ranks of the default process group, if there is one."""

        def total(tensor: Tensor) -> Tensor:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(tensor)
            return tensor

        self.settle(task, total)

    def choose(
        self,
        queries: Queries,
        presence: Tensor,
        tasks: Sequence[str],
        matcher: Matcher = "cosine",
        views: Sequence[str] = VIEWS,
    ) -> tuple[Tensor, Tensor]:
        """The likeliest of `tasks` for every sample.

        `cosine`: mean cosine to the keys over present views. `lda`: log-likelihood under task means and one
        shrunk covariance for all tasks, summed over present views, up to a number of the sample that is the
        same for all tasks. A task that never saw a view gets the mean score of those that did.

        Returns:
            index int64 B into `tasks`, and scores B×T (float64). Ties go to the earlier task; −1 and scores
            of zero where a sample has none of the views, so nothing speaks for any task.
        """
        self._check_choice(tasks, matcher, views)
        scores = torch.zeros(len(presence), len(tasks), dtype=torch.float64)
        weights = torch.zeros(len(presence), 1, dtype=torch.float64)
        shown = {
            view: (query.detach().double().cpu(), seen.cpu())
            for view, (query, seen) in enumerate(zip(queries, _seen(queries, presence), strict=True))
            if VIEWS[view] in views and any(self.tasks[t].count[view] > 0 for t in tasks)
        }
        heard = self._familiar(shown, tasks) if matcher == "lda" and self.unfamiliar else shown
        for view, (query, seen) in heard.items():
            known = torch.stack([self.tasks[t].count[view] > 0 for t in tasks])
            evidence = self._evidence(query, tasks, view, matcher)
            neutral = (evidence * known).sum(1, keepdim=True) / known.sum()
            seen_column = seen.double().unsqueeze(1)
            scores += torch.where(known, evidence, neutral) * seen_column
            weights += seen_column
        if matcher == "cosine":
            scores = scores / weights.clamp(min=1)
        index = torch.where(weights.squeeze(1) > 0, scores.argmax(1), -1)
        return index.to(presence.device), scores.to(presence.device)

    def _check_choice(self, tasks: Sequence[str], matcher: str, views: Sequence[str]) -> None:
        if not tasks:
            raise DeloError("There is no trained task to choose from", fix="train a stage first")
        given = [("task", t, list(self.tasks)) for t in tasks] + [("view", v, VIEWS) for v in views]
        for name, item, allowed in (*given, ("matcher", matcher, ("cosine", "lda"))):
            if item not in allowed:
                raise DeloError(f"Unknown {name} for the key memory", given=item, allowed=allowed)

    def _evidence(self, query: Tensor, tasks: Sequence[str], view: int, matcher: Matcher) -> Tensor:
        """B×T scores of one view."""
        if matcher == "cosine":
            means = torch.stack([self.tasks[t].means()[view] for t in tasks])
            return F.normalize(query, dim=1) @ F.normalize(means, dim=1).T
        return self._solved(tasks, view).scores(query)

    def _familiar(self, shown: Mapping[int, Shown], tasks: Sequence[str]) -> dict[int, Shown]:
        """The views without those rows that are far from all tasks, where a row has a nearer view."""
        near = {
            view: seen & (self._solved(tasks, view).distance(query) <= self.unfamiliar)
            for view, (query, seen) in shown.items()
        }
        some = torch.stack(list(near.values())).any(0) if near else torch.zeros(0, dtype=torch.bool)
        return {view: (query, torch.where(some, near[view], seen)) for view, (query, seen) in shown.items()}

    def _solved(self, tasks: Sequence[str], view: int) -> Discriminant:
        key = (tuple(tasks), view)
        if key not in self._discriminants:
            self._discriminants[key] = self._discriminant(*key)
        return self._discriminants[key]

    def _discriminant(self, tasks: Sequence[str], view: int) -> Discriminant:
        """By one Cholesky factor of the shrunk covariance of all tasks together."""
        parts = [self.tasks[t] for t in tasks]
        count = torch.stack([part.count[view] for part in parts])
        means = torch.stack([part.means()[view] for part in parts])
        covariance = torch.zeros(self.hidden, self.hidden, dtype=torch.float64)
        for part in parts:
            covariance += part.scatter(view)
        within = covariance / count.sum().clamp(min=1)
        covariance /= (count.sum() - (count > 0).sum()).clamp(min=1)
        # Of a view that never varies the sums leave rounding, which is larger the longer queries are.
        floor = 1e-10 * means.square().mean().clamp(min=1e-2)
        spread = covariance.diagonal().mean().maximum(floor)
        covariance *= 1 - self.shrinkage
        covariance.diagonal().add_(self.shrinkage * spread)
        centre = means[count > 0].mean(0)
        apart = means - centre
        factor = torch.linalg.cholesky(covariance)
        weight = torch.cholesky_solve(apart.T, factor).T
        drawn = torch.randn(PROBES, self.hidden, generator=torch.Generator().manual_seed(0)).double()
        probes = torch.linalg.solve_triangular(factor.T, drawn.T / PROBES**0.5, upper=True).T
        usual = self._usual(((probes @ within) * probes).sum(), count.sum())
        places = torch.where((count > 0).unsqueeze(1), means @ probes.T, torch.inf)
        return Discriminant(centre, weight, -0.5 * (weight * apart).sum(1), probes, places, usual)

    def _usual(self, inside: Tensor, count: Tensor) -> Tensor:
        """A new sample's mean distance, by that of `count` samples which made the covariance themselves.

        Infinite with few samples, whose distances have long tails: nothing is far then.
        """
        if count < ENOUGH * self.hidden:
            return torch.full_like(inside, torch.inf)
        # Left out of its own covariance A, x has xᵀ(A − xxᵀ)⁻¹x = h/(1 − h), with h = xᵀA⁻¹x. Samples that
        # are all but equal have a spread of the shrinkage alone, and hardly any distance.
        return (inside / (1 - inside / count)).clamp(min=0.01 * self.hidden)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Task -> sums by name."""
        return {task: statistics.tensors() for task, statistics in self.tasks.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace all keys by those of `state_dict`."""
        copies = {task: {n: tensor.clone() for n, tensor in kept.items()} for task, kept in state.items()}
        self.tasks = {task: self._read(tensors, task) for task, tensors in copies.items()}
        self._discriminants.clear()

    def save_task(self, folder: Path, task: str) -> None:
        """Write one task's statistics into its folder; files of other tasks are not touched."""
        if task not in self.tasks:
            raise DeloError("No keys of this task", given=task, allowed=list(self.tasks))
        found = {
            name: tensor.clone().contiguous() for name, tensor in self.tasks[task].file_tensors().items()
        }
        save_file(found, folder / self.FILE)

    def load(self, folders: Mapping[str, Path]) -> None:
        """Add the keys of trained tasks, task -> folder."""
        for task, folder in folders.items():
            if not (folder / self.FILE).is_file():
                file = folder / self.FILE
                raise DeloError(
                    f"The keys of task {task} are missing", given=file, fix="train the stage again"
                )
            self.tasks[task] = self._read(read_tensors(folder / self.FILE, f"The keys of task {task}"), task)
            self._discriminants.clear()

    def _read(self, tensors: dict[str, Tensor], task: str) -> KeyStatistics:
        if tensors["sums"].shape != (3, self.hidden):
            width = tensors["sums"].shape[-1]
            raise DeloError(
                f"The keys of task {task} are of another base", given=width, allowed=[self.hidden]
            )
        if not self.covariance:
            return KeyStatistics(tensors["count"], tensors["sums"])
        # Moments stay mapped to their file, which a machine's ranks share: at d = 4096 50 MB a task.
        if "correlations" in tensors:
            stored = Stored(tensors["correlations"], tensors["deviations"])
            return KeyStatistics(tensors["count"], tensors["sums"], stored=stored)
        if "products" not in tensors:  # as earlier versions wrote them, in float64
            raise DeloError(f"The keys of task {task} hold no second moments", fix="use the matcher cosine")
        return KeyStatistics(tensors["count"], tensors["sums"], tensors["products"])


def _seen(queries: Queries, presence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows have each view, bool B each: by the data's flags; the instruction's, whether it has
    words."""
    return presence[:, 0], presence[:, 1], (queries.instruction != 0).any(1)


def _add_products(product: Tensor, rows: Tensor) -> None:
    """Add Σ q·qᵀ over rows n×d to a d×d sum, in place."""
    product.addmm_(rows.T, rows)
