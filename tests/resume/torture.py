"""SIGKILL at random moments and the same command again, until a whole sequence is done; then all is compared.

    python tests/resume/torture.py --kills 50 --method delo --zero 2 --seed 0 --output summary.json

A tiny sequence is trained and evaluated as a user runs it. Complete runs follow one another until there were
so many kills; each is compared with a run that was never interrupted. Most launches are forks of this
process, which has imported everything slow, and call the command line's own entry point; every tenth one is
the user's command in fresh processes, as is the uninterrupted run. Words it does not know go to the training.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

import training_support as support  # noqa: E402
from launches import Launch  # noqa: E402
from same_end import differences  # noqa: E402

TRAIN = TESTS.parent / "launch" / "train.py"
#: How a kill's moment is chosen -> share of the kills: uniform over the time of a whole run; or just after a
#: folder that is being published or deleted, or a file that is being replaced, was seen in the run's folder.
WAYS = {"moment": 0.5, "folder": 0.35, "file": 0.15}
SIGNS = {"folder": re.compile(r"\.(draft|trash)-.*"), "file": re.compile(r"\..*(\.tmp|\.part\d+)")}
#: Folders seen at a kill: the beginning of their name, a folder above them, what was being done.
PHASES = (
    (".draft-", "adapters", "publishing an adapter"),
    (".draft-", "checkpoints", "saving a checkpoint"),
    (".trash-", "checkpoints", "deleting checkpoints"),
)
#: The latest such sign of a launch that may be waited for, and the longest time from it to the kill (s).
LATEST, AFTER = 6, 0.03
#: Every so many launches is the user's command; so often the ranks do not die at once, but up to so late (s).
REAL, STAGGERED, LATE = 10, 0.25, 1.0
#: What a launch imports that is slow.
SLOW = (
    "deepspeed", "matplotlib.figure", "peft", "transformers.models.llava.modeling_llava",
    "delo_eval.harness.run", "delo_llava.backbones.llava", "delo_llava.methods.delo", "delo_llava.runs.stage",
)  # fmt: skip
#: A launch that takes this many times the uninterrupted run's time hangs.
HANGS = 20


@dataclass
class Torture:
    """Settings, and what happened so far."""

    folder: Path
    method: str = "delo"
    zero: str = "2"
    ranks: int = 2
    seed: int = 0
    tasks: int = 3
    more: list[str] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    completions: int = 0
    differences: list[str] = field(default_factory=list)
    #: Seconds of a whole run, by kind of launch.
    lasts: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        """Data, base and the uninterrupted run; then a forked one, which must already equal it."""
        self.random = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        made = Launch([self._make], self.folder / "made.log")
        while made.running():
            time.sleep(0.05)
        if any(made.codes.values()):
            raise RuntimeError(made.end_of_log())
        self.one(self.folder / "whole", wanted=0, kind="real")
        warm()
        self.one(self.folder / "forked", wanted=0, kind="forked")

    def _make(self) -> int:
        """In a child: what builds models starts threads, which a parent of forks must not have."""
        import tiny_models

        support.write_sequence(self.folder, tasks=self.tasks)
        tiny_models.tiny_llava(self.folder / "model")
        return 0

    def words(self, run: Path) -> list[str]:
        """The command's words."""
        own = {"delo": ["--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8"]}.get(self.method, [])
        return support.words(
            self.folder / "tiny.yaml", self.folder / "model", run, f"--method={self.method}",
            f"--zero={self.zero}", "--train.save_every=1", *own, *self.more,
        )  # fmt: skip

    def launch(self, run: Path, kind: str) -> Launch:
        """Start the command."""
        number = sum(self.launches.values())
        self.launches[kind] += 1
        log, words = self.folder / "logs" / f"{number:04d}-{run.name}.log", self.words(run)
        log.parent.mkdir(exist_ok=True)
        port = support.free_port()
        if kind == "real":
            tools = Path(sys.executable).parent
            command = [sys.executable, str(TRAIN), *words]
            if self.zero != "none":
                options = [f"--num_gpus={self.ranks}", f"--master_port={port}"]
                command = [sys.executable, str(tools / "deepspeed"), *options, str(TRAIN), *words]
            return Launch([lambda: _exec(command, tools)], log)
        return Launch(
            [lambda rank=rank: _train(words, rank, self.ranks, port) for rank in range(self.ranks)], log
        )

    def one(self, run: Path, wanted: int, kind: str | None = None) -> None:
        """One complete run, killed as often as it happens while there were fewer than `wanted` kills."""
        while True:
            number = sum(self.launches.values())
            chosen = kind or ("real" if number % REAL == REAL - 1 else "forked")
            began, launch = time.monotonic(), self.launch(run, chosen)
            plan = self._plan(chosen) if len(self.kills) < wanted else None
            try:
                killed = self._watch(run, launch, plan, chosen)
            except BaseException:
                launch.kill()
                raise
            if killed is not None:
                self.kills.append({**killed, "run": run.name, "launch": chosen})
                self._say(wanted, killed)
                continue
            if any(launch.codes.values()):
                raise RuntimeError(
                    f"a launch ended by itself with {list(launch.codes.values())}:\n{launch.end_of_log()}"
                )
            self.lasts.setdefault(chosen, time.monotonic() - began)
            break
        self._close(run)

    def _close(self, run: Path) -> None:
        """Compare a complete run, and remove it if it is equal."""
        whole = self.folder / "whole"
        if run == whole:
            return
        self.completions += 1
        found = [f"{run.name}: {line}" for line in differences(whole, run)]
        stages = json.loads((run / "run.json").read_text())["stages"].values()
        self.resumed += sum(len(stage.get("resumed_at", [])) for stage in stages)
        self.differences += found
        tell(f"{run.name} complete: {len(found)} differences")
        for line in found:
            tell(f"  {line}")
        if not found:
            shutil.rmtree(run)

    def _plan(self, kind: str) -> dict[str, Any]:
        """How the next kill's moment is chosen."""
        way = self.random.choices([*WAYS], [*WAYS.values()])[0]
        plan: dict[str, Any] = {"way": way}
        if way == "moment":
            plan["after"] = self.random.uniform(0, self.lasts.get(kind, self.lasts["real"]))
        else:
            plan |= {"sign": self.random.randint(1, LATEST), "after": self.random.uniform(0, AFTER)}
        if kind == "forked" and self.ranks > 1 and self.random.random() < STAGGERED:
            plan |= {
                "late": self.random.uniform(0.01, LATE),
                "first": self.random.randrange(self.ranks),
            }
        return plan

    def _watch(
        self, run: Path, launch: Launch, plan: dict[str, Any] | None, kind: str
    ) -> dict[str, Any] | None:
        """Kill the launch as planned; None if it ended before."""
        began, before, signs = time.monotonic(), set(hidden(run)), 0
        seen = set(before)
        limit = began + HANGS * max([60.0, *self.lasts.values()])
        due = began + plan["after"] if plan and plan["way"] == "moment" else None
        sign = SIGNS.get(plan["way"]) if plan else None
        while launch.running():
            now = time.monotonic()
            if due is not None and now >= due:
                assert plan is not None
                where = phase(run, launch.log, before)
                launch.kill(plan.get("late", 0.0), plan.get("first", 0))
                return {"phase": where, "seconds": round(now - began, 2), **plan}
            if now > limit:
                raise TimeoutError(f"a launch hangs:\n{launch.end_of_log()}")
            if sign is not None and due is None:
                for path in set(hidden(run)) - seen:
                    seen.add(path)
                    signs += bool(sign.fullmatch(path.rpartition("/")[2]))
                if plan is not None and signs >= plan["sign"]:
                    due = now + plan["after"]
            wait = 0.003 if sign is not None else 0.03
            time.sleep(wait if due is None else min(wait, max(0.0, due - now)))
        return None

    def _say(self, wanted: int, killed: dict[str, Any]) -> None:
        done = len(self.kills)
        left = (time.monotonic() - self.began) / done * (wanted - done)
        eta = f"{int(left) // 60}:{int(left) % 60:02d}"
        tell(f"kill {done}/{wanted} ({killed['way']}) while {killed['phase']}, ETA {eta}")

    def run(self, wanted: int) -> dict[str, Any]:
        """Kill until there were `wanted` kills and the last run is complete; the summary."""
        began = self.began = time.monotonic()
        self.prepare()
        self.began = time.monotonic()
        number = 0
        while len(self.kills) < wanted:
            self.one(self.folder / f"run{number:03d}", wanted)
            number += 1
        return self.summary(time.monotonic() - began)

    def summary(self, seconds: float) -> dict[str, Any]:
        """What happened."""
        counts = {
            key: dict(Counter(kill[key] for kill in self.kills).most_common())
            for key in ("phase", "way", "launch")
        }
        return {
            "method": self.method, "zero": self.zero, "ranks": self.ranks, "seed": self.seed,
            "tasks": self.tasks, "more": self.more, "kills": len(self.kills), "kills_by": counts,
            "kills_of_ranks_one_after_the_other": sum("late" in kill for kill in self.kills),
            "launches": dict(self.launches), "stages_resumed_inside": self.resumed,
            "complete_runs_compared": self.completions, "differences": self.differences,
            "seconds": round(seconds, 1),
            "seconds_uninterrupted": {kind: round(value, 1) for kind, value in self.lasts.items()},
            "list": self.kills,
        }  # fmt: skip


def _exec(command: list[str], tools: Path) -> NoReturn:
    path = f"{tools}:{os.environ.get('PATH', '')}"
    os.execve(command[0], command, os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"})


def _train(words: list[str], rank: int, ranks: int, port: int) -> int:
    """In a child: what `launch/train.py` does on one rank."""
    from delo_llava.cli import main_train

    if ranks > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in group.items()}, MASTER_ADDR="127.0.0.1")
    return main_train(words)


def warm() -> None:
    """Import what a launch imports, and start no thread."""
    for name in SLOW:
        importlib.import_module(name)


def hidden(run: Path) -> Iterator[str]:
    """Paths below a run's folder whose name begins with a dot, as far as they can be seen right now."""
    for folder, names, files in os.walk(run):  # leaves out what vanishes meanwhile
        for name in (*names, *files):
            if name.startswith("."):
                yield f"{folder}/{name}"


def phase(run: Path, log: Path, before: set[str]) -> str:
    """What a launch is doing, from its log and what is on the disk; kills are told by it.

    Args:
        before: what `hidden` gave when it was started, left by an earlier one.
    """
    said = log.read_text(errors="replace") if log.is_file() else ""
    if f"-> {run}" not in said:
        return "starting"
    folders = [Path(path) for path in set(hidden(run)) - before]
    for prefix, parent, what in PHASES:
        if any(path.name.startswith(prefix) and parent in path.parent.parts[-2:] for path in folders):
            return what
    if (run / "complete.json").is_file():
        return "ending"
    record = json.loads((run / "run.json").read_text())
    results = run / "results.json"
    if not record.get("zero_shot"):
        return "reporting" if results.is_file() else "evaluating"
    rows = json.loads(results.read_text())["seconds"]["eval"]
    for index, name in enumerate(record["tasks"]):
        stage = record["stages"].get(name, {})
        if not (run / "adapters" / name).is_dir():
            return "training" if f"{name}: going on" in said or _trained(run, index) else "loading a stage"
        if "manifest" not in stage or (run / "checkpoints" / name).is_dir():
            return "closing a stage"
        if not stage.get("evaluated"):
            return "reporting" if rows[index] is not None else "evaluating"
    return "ending"


def _trained(run: Path, stage: int) -> bool:
    """Whether a step of this stage was logged."""
    file = run / "logs" / "metrics.jsonl"
    return file.is_file() and f'"stage": {stage},' in file.read_text()


def tell(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def main(words: list[str]) -> int:
    """Run it and write the summary; 1 if anything differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--method", default="delo")
    parser.add_argument("--zero", default="2", help="none: one process")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    parser.add_argument("--output", type=Path, help="the summary's JSON file")
    given, more = parser.parse_known_args(words)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        ranks = 1 if given.zero == "none" else 2
        torture = Torture(
            (given.folder or Path(temporary)).absolute(), given.method, given.zero, ranks, given.seed,
            given.tasks, more,
        )  # fmt: skip
        summary = torture.run(given.kills)
    if given.output:
        given.output.write_text(json.dumps(summary, indent=1) + "\n")
    tell(json.dumps({key: value for key, value in summary.items() if key != "list"}, indent=1))
    return int(bool(summary["differences"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
