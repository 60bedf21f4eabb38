"""What PRISM knows: the bases that updates stay out of, how gradients of the running task lie to them, and
how many directions each layer may keep.

A client of a federation has one, observes and projects with it, and tells `factors()`, `interference` and
`ranks()`; the server calls `unite` with all clients' factors. In one process the two are the same object.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from delo_llava.files import write_json_atomic
from delo_llava.methods.prism.sides import Side
from delo_llava.methods.prism.subspace import (
    Union,
    absorb,
    effective_rank,
    interference,
    local_factor,
    projected,
    union,
    water_fill,
)
from delo_llava.strict import read_json, read_tensors

BASES, FACTS = "prism.safetensors", "prism.json"
#: Eigenvalues below this share of the largest do not count for the effective rank (equation 6).
THRESHOLD = 1e-3


@dataclass(frozen=True)
class Room:
    """How many directions may be kept.

    Attributes:
        budget: columns of every basis until interference is known.
        sketch: rows of the streaming covariances, and the most columns that a basis can have.
        share: of the effective rank that may be kept at most.
        total: over all units, dealt by interference; None: every unit keeps as many as it may.
    """

    budget: int = 14
    sketch: int = 28
    share: float = 0.75
    total: int | None = None

    def most(self, width: int) -> int:
        """Columns that a basis of this width can have."""
        return max(1, min(int(self.share * width), self.sketch))


@dataclass
class Protection:
    """The state of all experts of one model.

    Attributes:
        sides: of all adapted linears; experts: E of each.
        bases: by name, E×d×b fp32; values: E×b float64, eigenvalues.
        budgets: by unit; gamma: by unit, the interference of every task that had some.
        sketches: by name of a basis, E×k×d: the gradients of the running task.
        met: by unit, the two sums of `subspace.interference` over the running task.
        facts: about the last union, for people.
    """

    sides: tuple[Side, ...]
    experts: int
    room: Room
    bases: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    gamma: dict[str, list[float]] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)
    met: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    # ---- while a task is trained
    def observe(self, gradients: Mapping[str, Tensor], masses: Mapping[str, Tensor], measure: bool) -> None:
        """Take in the gradients of a step, before anything is projected (equations 1 and 5).

        Args:
            gradients: by name of the trained tensor.
            masses: by name of the linear, the mean weight of each of its experts over the step's tokens, E.
            measure: also how much of them lies inside the bases.
        """
        for side in self.sides:
            rows = side.rows(gradients[side.parameter], self.experts)
            mass = masses[side.linear].to(rows)
            if measure and side.basis in self.bases:
                here = interference(rows, self._basis(side.basis, rows.device), mass)
                self.met[side.unit] = self.met.get(side.unit, torch.zeros_like(here)).to(here) + here
            known = self.sketches.get(side.basis, rows[:, :0]).to(rows)
            self.sketches[side.basis] = absorb(known, rows * mass.sqrt()[:, None, None], self.room.sketch)

    def project(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], strength: float
    ) -> dict[str, Tensor]:
        """The trained tensors with the update's part inside the bases taken out (equation 4), fp32.

        It is the whole update that is projected, moments and weight decay included: they would bring back
        what was taken from a gradient.
        """
        new = {}
        for side in self.sides:
            if side.basis not in self.bases:
                continue
            old = before[side.parameter].double()
            change = side.rows(after[side.parameter].double() - old, self.experts)
            basis = self._basis(side.basis, change.device).double()
            new[side.parameter] = (old + side.tensor(projected(change, basis, strength))).float()
        return new

    def _basis(self, name: str, device: torch.device) -> Tensor:
        """A basis on `device`, where it then stays."""
        self.bases[name] = self.bases[name].to(device)
        return self.bases[name]

    # ---- when a task ends
    def factors(self) -> dict[str, Tensor]:
        """F of every basis for the running task, E×d×b float64 on the CPU: all that a client tells of its
        gradients.
        """
        unit = {side.basis: side for side in self.sides}
        return {
            name: local_factor(sketch.cpu(), self.budget(unit[name]))
            for name, sketch in self.sketches.items()
        }

    def ranks(self) -> dict[str, int]:
        """The effective rank of each unit's gradients, pooled over experts, linears and sides."""
        pooled: dict[str, dict[str, Tensor]] = {}
        for side in self.sides:
            if side.basis in self.sketches:
                pooled.setdefault(side.unit, {})[side.basis] = self.sketches[side.basis].cpu().flatten(0, 1)
        return {
            unit: effective_rank(torch.cat(list(parts.values())), THRESHOLD) for unit, parts in pooled.items()
        }

    def interference(self) -> dict[str, float]:
        """γ of each unit over the running task; nothing where nothing was measured."""
        return {unit: float(sums[0] / sums[1]) for unit, sums in self.met.items() if float(sums[1]) > 0}

    def unite(
        self, factors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], ranks: Mapping[str, int],
        gamma: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Close a task: new bases from the clients' factors, then new budgets for the next task.

        Args:
            factors: what each client told; weights: its share of the examples.
            ranks: of the pooled gradients; gamma: the clients' mean interference.
        """
        told = {}
        for side in {side.basis: side for side in self.sides}.values():
            shares = [w for f, w in zip(factors, weights, strict=True) if side.basis in f]
            parts = [f[side.basis] for f in factors if side.basis in f]
            if not parts:
                continue
            old = self.bases.get(side.basis, torch.zeros(self.experts, side.width, 0))
            values = self.values.get(side.basis, torch.zeros(self.experts, 0, dtype=torch.float64))
            found = union(old.cpu(), values, parts, shares, self.budget(side))
            self.bases[side.basis], self.values[side.basis] = found.basis.float().contiguous(), found.values
            told[side.basis] = found
        for unit, value in gamma.items():
            self.gamma.setdefault(unit, []).append(value)
        if self.gamma:
            self._allot(ranks)
        self.facts = {"ranks": dict(ranks), "union": {name: _summary(found) for name, found in told.items()}}
        self.sketches, self.met = {}, {}

    def budget(self, side: Side) -> int:
        """Columns that a side's basis may have now."""
        return min(self.budgets.get(side.unit, self.room.budget), self.room.most(side.width))

    def _allot(self, ranks: Mapping[str, int]) -> None:
        """Deal the directions among the units by the mean γ² (equations 6 and 7)."""
        width = {side.unit: side.width for side in self.sides}
        units = [unit for unit in sorted(width) if unit in ranks]
        caps = [min(max(1, int(self.room.share * ranks[u])), self.room.most(width[u])) for u in units]
        means = [sum(seen) / len(seen) if (seen := self.gamma.get(u, [])) else 0.0 for u in units]
        total = sum(caps) if self.room.total is None else self.room.total
        self.budgets |= dict(zip(units, water_fill([m**2 for m in means], caps, total), strict=True))

    # ---- what is kept
    def running(self) -> dict[str, Tensor]:
        """What the running task has gathered, by name; `resume` takes it."""
        sketches = {f"sketch/{name}": tensor for name, tensor in self.sketches.items()}
        return sketches | {f"met/{unit}": tensor for unit, tensor in self.met.items()}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `running`."""
        kinds: dict[str, dict[str, Tensor]] = {"sketch": {}, "met": {}}
        for name, tensor in state.items():
            kind, _, key = name.partition("/")
            kinds[kind][key] = tensor
        self.sketches, self.met = kinds["sketch"], kinds["met"]

    def save(self, folder: Path) -> None:
        """Write bases, eigenvalues, budgets and interference."""
        tensors = {f"basis/{name}": tensor.cpu() for name, tensor in self.bases.items()}
        tensors |= {f"values/{name}": tensor for name, tensor in self.values.items()}
        save_file(tensors, folder / BASES)
        facts = {"budgets": self.budgets, "gamma": self.gamma} | self.facts
        write_json_atomic(folder / FACTS, facts)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            DeloError: a file is missing or damaged.
        """
        fix = "train the stage again"
        tensors = read_tensors(folder / BASES, "The bases of a stage", fix)
        facts = read_json(folder / FACTS, "The budgets of a stage", fix)
        self.bases = {n.removeprefix("basis/"): t for n, t in tensors.items() if n.startswith("basis/")}
        self.values = {n.removeprefix("values/"): t for n, t in tensors.items() if n.startswith("values/")}
        self.budgets, self.gamma = facts["budgets"], facts["gamma"]


def _summary(found: Union) -> dict[str, list[float]]:
    """What a union says of itself, for each expert."""
    told = {"cut": found.cut, "retained": found.retained, "residual": found.residual, "bound": found.bound}
    return {name: value.tolist() for name, value in told.items()}
