"""Step checkpoints of a running stage: what is stored, what is gathered, and how a launch goes on from it.

A checkpoint holds whole tensors, so it serves every engine and any number of ranks: `weights.safetensors` and
`optimizer.safetensors` (gathered from ZeRO's partitions), `cut.safetensors` (which records were cut),
`rank-00000.safetensors` for each rank (random states, the method's running sums and rows), `state.json`, and
`manifest.json`, written last.
"""

import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from delo_llava.adapters.store import tensor_report
from delo_llava.data.omitted import CutRecords
from delo_llava.engines.base import Engine, trained_parameters
from delo_llava.engines.ranks import Ranks
from delo_llava.engines.shards import OptimizerState
from delo_llava.errors import DeloError
from delo_llava.files import fsync, write_json_atomic
from delo_llava.methods.base import ROWS, SUMMED, Method
from delo_llava.runs.steps import StepStore, told_if_refused
from delo_llava.strict import read_json, read_tensors
from delo_llava.training.loop import Ledger

SCHEMA = "delo-llava/step/1"
REMOVE = "remove it to start the stage again"
#: Task/part -> numbers of the records of which it was cut.
CUT = "cut.safetensors"
#: Seconds until files of other ranks must show on a network file system that caches folders.
PATIENCE = 90.0


@dataclass
class Resumed:
    """A checkpoint as one rank reads it.

    Attributes:
        step: the next step to train.
        same_world: as many ranks as wrote it, so every bit can be the same.
        rank: this rank's tensors; the method's sums and rows of all ranks if their number changed.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    same_world: bool
    rank: dict[str, Tensor]

    @property
    def method(self) -> dict[str, Tensor]:
        """What `Method.state_dict` gave."""
        return _under("method/", self.rank)

    def ledger(self) -> Ledger:
        """The record of the steps before."""
        packed = {}
        if (self.folder / CUT).is_file():
            for name, numbers in _tensors(self.folder / CUT).items():
                task, _, part = name.partition("/")
                packed[task, part] = numbers.numpy()
        known, cut = dict(self.state["ledger"]), CutRecords(packed)
        cut.add((task, part, name) for task, part, name in known.pop("cut", ()))  # of earlier versions
        return Ledger(**known, cut=cut)

    def load_weights(self, model: nn.Module) -> None:
        """Copy the trained parameters into the model; before an engine shards them.

        Raises:
            DeloError: names or shapes differ; each one is told.
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = _tensors(self.folder / "weights.safetensors")
        report = tensor_report({n: p.shape for n, p in named.items()}, {n: t.shape for n, t in found.items()})
        if report:
            raise DeloError(
                "\n".join(["The checkpoint is of another model:", *report]),
                given=self.folder,
                fix="use the code and settings that wrote it, or remove it to start the stage again",
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(found[name])

    def load_engine(self, engine: Engine) -> None:
        """Give the optimiser and the file's schedule their state back."""
        kept = self.state["optimizer"]
        scalars = {key: (value, kind) for key, (value, kind) in kept["scalars"].items()}
        tensors = _tensors(self.folder / "optimizer.safetensors")
        engine.load_optimizer(OptimizerState(tensors, scalars, kept["groups"]))
        engine.load_schedule(self.state["schedule"])

    def load_random(self) -> bool:
        """Set this rank's random states; False if it has none here (there are more ranks than before)."""
        if "random/torch" not in self.rank:
            return False
        set_random_state(_under("random/", self.rank))
        return True


class StepCheckpoints:
    """Saves and finds the checkpoints of one stage; every rank calls every method.

    Args:
        facts: entries of `state.json` that say what is being trained (task, stage, engine).
    """

    def __init__(self, steps: StepStore, ranks: Ranks, method: Method, facts: dict[str, Any]) -> None:
        self.steps, self.ranks, self.method, self.facts = steps, ranks, method, facts
        self.saved: int | None = None
        self.faults: list[str] = []
        self._launch = ranks.same(uuid.uuid4().hex[:8])

    def find(self) -> Resumed | None:
        """The newest valid checkpoint, or None; what is wrong with newer ones is in `faults`.

        Raises:
            DeloError: a valid one cannot be read.
        """
        place: list[Any] = [None, []]

        def look() -> None:
            self.steps.clear()
            path, faults = self.steps.newest_valid()
            place[:] = [None if path is None else path.name, faults]

        self.ranks.run_first(look)
        name, self.faults = self.ranks.same(place)
        if name is None:
            return None
        folder = self.steps.folder / name
        state = read_json(folder / "state.json", "The state of a checkpoint", REMOVE)
        if state.get("schema") != SCHEMA or {key: state.get(key) for key in self.facts} != self.facts:
            raise DeloError(
                "A checkpoint is not of this stage, or of another version of this program",
                given=folder,
                fix=REMOVE,
            )
        self.saved = state["step"]
        return Resumed(
            folder, state["step"], state, state["world"] == self.ranks.world, self._rank_state(folder, state)
        )

    def save(self, step: int, engine: Engine, ledger: Ledger) -> None:
        """Store the run as it stands before `step`, once.

        Raises:
            DeloError: on every rank, if one of them cannot write; older checkpoints stay as they are.
        """
        if self.saved == step:
            return
        draft, first = self.steps.draft(step, self._launch), self.ranks.first
        self.ranks.run_first(lambda: _make(draft))
        optimizer = engine.gather_optimizer()
        with engine.gathered():
            weights = {
                n: p.detach().cpu().clone() for n, p in trained_parameters(engine.module).items() if first
            }
        ledger = ledger.gathered(self.ranks)
        content = {
            "schema": SCHEMA,
            **self.facts,
            "step": step,
            "world": self.ranks.world,
            "time": time.time(),
            "optimizer": {"scalars": optimizer.scalars, "groups": optimizer.groups},
            "schedule": engine.schedule_state(),
            "ledger": {name: value for name, value in vars(ledger).items() if name != "cut"},
        }
        cut = {"/".join(key): torch.from_numpy(numbers) for key, numbers in ledger.cut.packed().items()}
        tensors = {"weights.safetensors": weights, "optimizer.safetensors": optimizer.tensors, CUT: cut}
        self.ranks.run_each(lambda: self._write(draft, content, tensors))
        self.ranks.run_first(lambda: self._publish(draft, step))
        self.saved = step

    def discard(self) -> None:
        """Delete the stage's checkpoints: its adapter is published."""
        self.ranks.run_first(self.steps.discard)

    def _write(self, draft: Path, content: dict[str, Any], shared: Mapping[str, dict[str, Tensor]]) -> None:
        mine = {f"method/{name}": t.detach().cpu() for name, t in self.method.state_dict().items()}
        mine |= {f"random/{name}": tensor for name, tensor in random_state().items()}
        with told_if_refused(self.steps.folder):
            _save(mine, draft / rank_file(self.ranks.rank))
            if self.ranks.first:
                for name, tensors in shared.items():
                    _save(tensors, draft / name)
                write_json_atomic(draft / "state.json", content)

    def _publish(self, draft: Path, step: int) -> None:
        waited, wanted = time.monotonic(), {rank_file(rank) for rank in range(self.ranks.world)}
        while lacking := wanted - {path.name for path in draft.iterdir()}:
            if time.monotonic() - waited > PATIENCE:
                raise DeloError(
                    "The first rank does not see the files that the other ranks wrote",
                    given=f"{draft}: {', '.join(sorted(lacking))}",
                    fix="put --output on a file system that all nodes share",
                )
            time.sleep(0.2)
        self.steps.publish(draft, step)

    def _rank_state(self, folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
        """This rank's tensors. With another number of ranks, the first takes all of the sums and rows."""
        own, world = self.ranks.rank, state["world"]
        mine = _tensors(folder / rank_file(min(own, world - 1)))
        if world == self.ranks.world:
            return mine
        sums, rows = ([n for n in mine if n.startswith(f"method/{kind}")] for kind in (SUMMED, ROWS))
        if own == 0:
            for rank in range(1, world):
                other = _tensors(folder / rank_file(rank))
                mine |= {name: mine[name] + other[name] for name in sums}
                mine |= {name: torch.cat([mine[name], other[name]]) for name in rows}
        else:
            mine |= {name: torch.zeros_like(mine[name]) for name in sums}
            mine |= {name: mine[name][:0] for name in rows}
        return {name: t for name, t in mine.items() if own < world or not name.startswith("random/")}


def rank_file(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}.safetensors"


def random_state() -> dict[str, Tensor]:
    """The states of Python's, numpy's and torch's generators of this process."""
    version, words, spare = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_spare, numpy_spare = legacy
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_spare], dtype=torch.int64),
        "numpy_spare": torch.tensor([numpy_spare], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set what `random_state` gave."""
    version, *words = state["python"].tolist()
    spare = state["python_spare"].tolist()
    random.setstate((version, tuple(words), spare[0] if spare else None))
    *keys, position, has_spare = state["numpy"].tolist()
    words32 = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words32, position, has_spare, state["numpy_spare"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _tensors(path: Path) -> dict[str, Tensor]:
    return read_tensors(path, "A file of a checkpoint", REMOVE)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    fsync(path)


def _make(draft: Path) -> None:
    with told_if_refused(draft.parent):
        draft.mkdir(parents=True)
