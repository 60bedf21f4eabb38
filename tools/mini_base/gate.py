"""The gate: is the base adaptable, do both modalities matter, does sequential training forget?"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from delo_llava.files import user_path
from delo_llava.mini.build import COLLECTIONS, ensure
from delo_llava.mini.entities import Split
from delo_llava.tasks import Record
from tools.mini_base.adapt import (
    COMPLETE,
    NO_CONTEXT,
    NO_IMAGE,
    Base,
    Presence,
    Training,
    exact_match,
    fit,
    missing_half_half,
    new_adapter,
    read,
)  # fmt: skip
from tools.mini_base.command import run as run_command

PATTERNS: dict[str, Presence] = {"complete": COMPLETE, "no image": NO_IMAGE, "no context": NO_CONTEXT}
log = logging.getLogger(__name__)
PARTS = ("individual", "missing", "sequential")
MISSING = 0.7
Scores = dict[str, dict[str, float]]
"""task -> measure -> share in [0, 1]."""


@dataclass(frozen=True)
class Clause:
    """One condition of the gate: on how many of six tasks it must hold and a test of one task's scores."""

    text: str
    of_six: int
    holds: Callable[[dict[str, float]], bool]

    def needed(self, tasks: int) -> int:
        """On how many of `tasks` it must hold: the same share, rounded up."""
        return -(-self.of_six * tasks // 6)


CLAUSES = (
    Clause("at least .80 complete", 5, lambda s: s["complete"] >= 0.80),
    Clause("at least .20 above the majority", 6, lambda s: s["complete"] >= s["majority"] + 0.20),
    Clause("dropping the image costs .20 or more", 4, lambda s: s["complete"] - s["no image"] >= 0.20),
    Clause("dropping the context costs .10 or more", 2, lambda s: s["complete"] - s["no context"] >= 0.10),
    Clause(
        "each modality alone is .10 above the majority", 2,
        lambda s: min(s["no image"], s["no context"]) >= s["majority"] + 0.10,
    ),
)  # fmt: skip
FORGETTING = 0.20


@dataclass
class Data:
    """Training and evaluation rows of each task."""

    train: dict[str, Sequence[Record]]
    judged: dict[str, Sequence[Record]]

    @classmethod
    def read(cls, root: Path, split: Split, tasks: tuple[str, ...]) -> "Data":
        """The train rows of each task and those of the split that is judged."""
        return cls({t: read(root, t, "train") for t in tasks}, {t: read(root, t, split) for t in tasks})


def patterns(base: Base, rows: Sequence[Record]) -> dict[str, float]:
    """Exact match under each named pattern and with the mixed missing rows of training."""
    scores = {name: exact_match(base, rows, [p] * len(rows)) for name, p in PATTERNS.items()}
    mixed = missing_half_half(np.random.default_rng(1), len(rows), MISSING)
    return scores | {"70% missing": exact_match(base, rows, mixed)}


def majority(rows: Sequence[Record]) -> float:
    """Share of the commonest answer."""
    return Counter(r.answer for r in rows).most_common(1)[0][1] / len(rows)


def individual(base: Base, data: Data, training: Training, missing: float) -> Scores:
    """One fresh adapter per task, scored under every pattern."""
    found: Scores = {}
    for task, rows in data.train.items():
        judged = data.judged[task]
        found[task] = {
            "majority": majority(judged),
            "zero-shot": exact_match(base, judged, [COMPLETE] * len(judged)),
        }
        adapter = new_adapter(base, training)
        found[task]["loss"] = fit(base, adapter, rows, training, missing)
        found[task] |= patterns(base, judged)
        adapter.unload()
        log.info("%s, %.0f%% missing in training: %s", task, 100 * missing, found[task])
    return found


def sequential(base: Base, data: Data, training: Training) -> Scores:
    """One adapter through all tasks in order: each task's score when learned and at the end."""
    adapter, found = new_adapter(base, training), {}
    for task, rows in data.train.items():
        fit(base, adapter, rows, training)
        found[task] = {"learned": exact_match(base, data.judged[task], [COMPLETE] * len(data.judged[task]))}
        log.info("%s, sequential: %s", task, found[task])
    for task, rows in data.judged.items():
        found[task]["at the end"] = exact_match(base, rows, [COMPLETE] * len(rows))
    adapter.unload()
    return found


def forgetting(scores: Scores) -> float:
    """Mean drop from when learned to the end, over all tasks but the last."""
    drops = [s["learned"] - s["at the end"] for s in list(scores.values())[:-1]]
    return float(np.mean(drops)) if drops else 0.0


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each clause with what was found; clauses whose part was not run are left out."""
    rows = []
    if "individual" in result:
        for clause in CLAUSES:
            held = [t for t, s in result["individual"].items() if clause.holds(s)]
            needed = clause.needed(len(result["individual"]))
            rows.append(
                {
                    "clause": f"{clause.text} (on {needed})",
                    "found": ", ".join(held),
                    "pass": len(held) >= needed,
                }
            )
    if "sequential" in result:
        lost = forgetting(result["sequential"])
        rows.append(
            {
                "clause": "sequential LoRA forgets .20 or more",
                "found": f"{lost:.3f}",
                "pass": lost >= FORGETTING,
            }
        )
    return rows


def tables(result: dict[str, Any]) -> list[Table]:
    """The measured scores and the verdicts, ready to print."""
    made = []
    for part in PARTS:
        scores: Scores = result.get(part, {})
        if scores:
            columns = list(next(iter(scores.values())))
            table = Table("task", *columns, title=f"{part}, {result['split']} split")
            for task, row in scores.items():
                table.add_row(task, *(f"{row[c]:.3f}" for c in columns))
            made.append(table)
    verdict = Table("clause", "holds on / value", "", title="gate")
    for row in result["verdicts"]:
        verdict.add_row(row["clause"], row["found"], "pass" if row["pass"] else "FAIL")
    return [*made, verdict]


def run(base: Base, data: Data, parts: list[str], training: Training) -> dict[str, Any]:
    """Run the named parts and judge them."""
    result: dict[str, Any] = {"training": vars(training)}
    if "individual" in parts:
        result["individual"] = individual(base, data, training, 0.0)
    if "missing" in parts:
        result["missing"] = individual(base, data, training, MISSING)
    if "sequential" in parts:
        result["sequential"] = sequential(base, data, training)
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line: adapt, judge, print, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini_base.gate", description=__doc__)
    parser.add_argument("--recipe", choices=list(COLLECTIONS), default="mini6")
    parser.add_argument("--base", default="mini-llava", help="folder or shipped name of the base")
    parser.add_argument(
        "--data", type=user_path, help="folder that holds (or gets) the built tasks; the cache by default"
    )
    parser.add_argument("--output", type=user_path, default=Path("gate.json"))
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--tasks", nargs="+", help="some of the recipe's; all in its order by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--batch", type=int, default=Training.batch)
    parser.add_argument("--rate", type=float, default=Training.rate)
    options = parser.parse_args(argv)
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    collection = COLLECTIONS[options.recipe]
    known = collection.tasks
    tasks = [task for task in known if not options.tasks or task in options.tasks]
    if unknown := set(options.tasks or ()) - set(known):
        parser.error(f"{options.recipe} has no task {', '.join(sorted(unknown))}: it has {', '.join(known)}")
    base = Base.load(options.base)
    data = Data.read(ensure(collection, options.data), options.split, tuple(tasks))
    result = run(base, data, options.parts, Training(options.steps, options.batch, options.rate))
    result |= {"recipe": options.recipe, "data": collection.version}
    result |= {"base": options.base, "split": options.split}
    result["verdicts"] = verdicts(result)
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for table in tables(result):
        Console().print(table)


if __name__ == "__main__":
    run_command(main)
