"""A benchmark's runs: every method under every missing setting with every seed, and trials of rates."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from delo_llava.config import RunConfig, config_layers, core_config, load_config, with_methods
from delo_llava.data.recipe import read_recipe, recipe_defaults
from delo_llava.engines import signals
from delo_llava.engines.signals import Preempted
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic
from delo_llava.registry import plugin_names
from delo_llava.schema import flat

#: Setting -> its words.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "complete": ("--missing.ratio=0",),
    "missing70": ("--missing.ratio=0.7", "--missing.kind=both"),
    "image70": ("--missing.ratio=0.7", "--missing.kind=image"),
    "text70": ("--missing.ratio=0.7", "--missing.kind=text"),
    "neutral": ("--missing.ratio=0", "--data.template=neutral"),
    "neutral70": ("--missing.ratio=0.7", "--missing.kind=both", "--data.template=neutral"),
}
#: Setting -> the same one with the template `neutral`: one wording for all tasks, in training too.
NEUTRAL: Mapping[str, str] = {"complete": "neutral", "missing70": "neutral70"}
#: Asked in place of every instruction after the last stage: what images and contexts alone tell of the task.
WORDING = "look at what is given and answer"
#: Folder of the trials within the benchmark's.
TRIALS = "rates"
#: Seconds that a run which was asked to leave has for its last checkpoint.
PATIENCE = 120.0
#: Settings that a finished run may have otherwise: places, and a length that gives way to the base.
ANYWHERE = ("output", "task_seq", "model", "data.root", "data.max_length")
#: Folder of the times of answering.
DECODING = "decoding"


@dataclass(frozen=True)
class Entry:
    """A method in one form: `delo`, or `hide --hide.cross_terms=true`.

    Attributes:
        method: its name.
        words: options that differ from the method's defaults.
    """

    method: str
    words: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The method and its options, as a folder can be called."""
        own = (word.lstrip("-").removeprefix(f"{self.method}.") for word in self.words)
        return "+".join([self.method, *(re.sub(r"[^\w.=-]", "_", word) for word in own)])

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read a word of `--methods`.

        Raises:
            DeloError: no such method.
        """
        method, *words = shlex.split(text) or [""]
        if method not in plugin_names("method"):
            raise DeloError(
                "There is no such method.", given=method, allowed=("all", *plugin_names("method"))
            )
        return cls(method, tuple(words))


@dataclass(frozen=True)
class Planned:
    """One run: where it writes, and the words of `train` that make it."""

    folder: Path
    words: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether all of it was trained and evaluated."""
        return (self.folder / "complete.json").is_file()

    def require_same(self) -> None:
        """See that a finished run is the one that is planned.

        Raises:
            DeloError: it has other settings; each is named.
        """
        stored = flat(load_config(self.folder / "config.yaml").model_dump(mode="json"))
        given = flat(resolved(self.words).model_dump(mode="json"))
        keys = [key for key in {**stored, **given} if key not in ANYWHERE]
        apart = [key for key in keys if stored.get(key) != given.get(key)]
        if apart:
            told = (f"  {key}: the run has {stored.get(key)}, wanted {given.get(key)}" for key in apart)
            raise DeloError(
                "A finished run in the output folder has other settings.\n" + "\n".join(told),
                given=str(self.folder),
                fix="choose another --output, or move that run away",
            )


@dataclass(frozen=True)
class Benchmark:
    """What is run.

    Attributes:
        settings: keys of `SETTINGS`; rates are chosen under the first.
        factors: of a method's own learning rate, tried on the first task; one alone needs no trial.
        words: further words of `train`, for every run.
    """

    task_seq: str
    entries: Sequence[Entry]
    seeds: Sequence[int]
    settings: Sequence[str]
    output: Path
    factors: Sequence[float] = (1.0,)
    words: Sequence[str] = ()

    def rates(self, entry: Entry, factor: float) -> dict[str, float]:
        """The method's own learning rates, by file or code, times `factor`; checks every word on the way.

        Returns:
            setting of `train` -> rate; the projector's only where it has one of its own.

        Raises:
            DeloError: an unknown key or value.
        """
        train = resolved((f"--task_seq={self.task_seq}", *self._of(entry))).train
        rates = {"lr": train.lr, "projector_lr": train.projector_lr}
        return {key: factor * rate for key, rate in rates.items() if rate is not None}

    def run(self, entry: Entry, setting: str, seed: int, factor: float) -> Planned:
        """The run of one method, setting and seed, with its rate as chosen."""
        folder = self.output / setting / f"{entry.label}-s{seed}"
        words = (f"--task_seq={self.task_seq}", *self._words(entry, setting, seed, factor))
        return Planned(folder, (*words, f"--output={folder}"))

    def runs(self, entry: Entry, factor: float) -> list[Planned]:
        """All runs of one method."""
        return [self.run(entry, setting, seed, factor) for setting in self.settings for seed in self.seeds]

    def trial(self, entry: Entry, factor: float) -> Planned:
        """A run on the first task alone, judged on its validation records."""
        folder = self.output / TRIALS / f"{entry.label}-x{factor:g}"
        words = (
            f"--task_seq={self.output / TRIALS / 'first.yaml'}", "--eval.split=val",
            "--eval.last_patterns=[]", *self._words(entry, self.settings[0], self.seeds[0], factor),
        )  # fmt: skip
        return Planned(folder, (*words, f"--output={folder}"))

    def decoding_file(self, entry: Entry) -> Path:
        """Where the time of answering with a method's last stage is noted, beside the base's."""
        return self.output / DECODING / f"{entry.label}.json"

    @property
    def keeps_aside(self) -> bool:
        """Whether the sequence keeps tasks aside, for general ability."""
        return bool(read_recipe(self.task_seq).general)

    def check_settings(self) -> None:
        """Refuse settings that the sequence does not have.

        Raises:
            DeloError: one with the template `neutral`, of a recipe without it.
        """
        recipe, neutral = read_recipe(self.task_seq), set(NEUTRAL.values())
        asked = [setting for setting in self.settings if setting in neutral]
        if asked and "neutral" not in recipe.templates:
            raise DeloError(
                f"The recipe {recipe.name} has no template `neutral`.",
                given=f"--settings {asked[0]}",
                allowed=[setting for setting in SETTINGS if setting not in neutral],
            )

    def write_first(self) -> None:
        """The recipe of the trials: the sequence's first task.

        Raises:
            DeloError: it has no validation records.
        """
        recipe = read_recipe(self.task_seq)
        first = recipe.tasks[0]
        if "val" not in first.files:
            raise DeloError(
                "Learning rates are chosen on validation records, and the first task has none.",
                given=f"{recipe.name}/{first.name}",
                fix="give the task a `val` file, or --rates 1 to keep every method's own rate",
            )
        base = str(Path(self.task_seq).absolute()) if Path(self.task_seq).is_file() else self.task_seq
        content = {"name": f"{recipe.name}-{first.name}", "like": base, "tasks": [first.name]}
        path = self.output / TRIALS / "first.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, yaml.safe_dump(content, sort_keys=False))

    def _of(self, entry: Entry) -> tuple[str, ...]:
        return (f"--method={entry.method}", *entry.words, *self.words)

    def _words(self, entry: Entry, setting: str, seed: int, factor: float) -> tuple[str, ...]:
        changed = {} if factor == 1 else self.rates(entry, factor)
        rate = (f"--train.{key}={value:g}" for key, value in changed.items())
        missing = (*SETTINGS[setting], f"--missing.seed={seed}")
        return (*self._of(entry), f"--seed={seed}", *missing, *rate)


def entries(given: Sequence[str]) -> list[Entry]:
    """The methods asked for; `all` is every registered one, as it is.

    Raises:
        DeloError: an unknown method, or one form twice.
    """
    found: list[Entry] = []
    for word in given:
        found += map(Entry, plugin_names("method")) if word == "all" else [Entry.parse(word)]
    labels = [entry.label for entry in found]
    if again := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise DeloError("A method is named twice.", given=again)
    return found


def ask_in_one_wording(planned: Planned) -> int:
    """Evaluate the last stage with `WORDING` in place of every instruction; nothing is done twice."""
    command = [sys.executable, "-m", "delo_eval", "--run", str(planned.folder), "--patterns", "run"]
    return _watched([*command, "--wording", WORDING], f"evaluating {planned.folder}")


def ask_general(planned: Planned, stage: str) -> int:
    """Ask the tasks that the recipe keeps aside of one stage (`zero-shot`, `last`); nothing is done twice."""
    command = [sys.executable, "-m", "delo_eval", "--run", str(planned.folder), "--stage", stage]
    return _watched([*command, "--general"], f"evaluating {planned.folder}")


def time_decoding(planned: Planned, file: Path) -> int:
    """Measure how long answering takes with a run's last stage, beside the base in one process."""
    command = [sys.executable, "-m", "delo_eval", "decoding", "--run", str(planned.folder)]
    return _watched([*command, "--output", str(file)], f"timing {planned.folder}")


def launch(planned: Planned, ranks: int) -> int:
    """Train and evaluate one run to its end, or on from where it was.

    Returns:
        the exit code.

    Raises:
        Preempted: this process was asked to leave; the run was asked too and saved what it could.
    """
    with socket.socket() as probe:  # parts of one benchmark may run side by side
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher), "--num_gpus", str(ranks), "--master_port", str(port), "--no_local_rank", "--module",
        "delo_llava.cli", "train", *planned.words,
    ]  # fmt: skip
    return _watched(command, f"training {planned.folder}")


def _watched(command: Sequence[str], what: str) -> int:
    """Run a command in a process group of its own; a signal to leave is handed on to all of the group."""
    with subprocess.Popen(command, start_new_session=True) as child:
        try:
            while child.poll() is None:
                if reason := signals.requested():
                    raise Preempted(reason, what)
                time.sleep(0.2)
        finally:
            _end_group(child)
        return child.returncode


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """End what is left of a group: a launcher may be gone before its ranks are, which hold the run's lock."""
    for number, seconds in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
            last = time.monotonic() + seconds
            while time.monotonic() < last:
                child.poll()  # reaped, or it would count as living
                os.killpg(child.pid, 0)
                time.sleep(0.05)


def resolved(words: Sequence[str]) -> RunConfig:
    """The settings that words of `train` make, over those of the recipe.

    Raises:
        DeloError: an unknown key or value.
    """
    layers = config_layers(None, words)
    return with_methods(core_config(layers, recipe_defaults(str(layers["task_seq"]))))
