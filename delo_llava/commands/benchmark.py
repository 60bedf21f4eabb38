"""Train every method under every setting and seed, rates by validation, and write one page of tables."""

import argparse
import importlib
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delo_llava.commands.base import Command, at_least, say
from delo_llava.engines import signals
from delo_llava.files import user_path

if TYPE_CHECKING:
    from delo_llava.cluster.benchmark import Benchmark, Entry, Planned

SETTINGS = ("complete", "missing70", "image70", "text70", "neutral", "neutral70")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, in which part; all other words are those of `train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """Other words are those of `train` and hold for every run: --model=mini-qwen
Stopped at any moment, the same command goes on. Parts share one folder:
  delo-llava benchmark --task_seq mini6 --methods all --seeds 0 1 2 --part 1/4
  sbatch --array=1-8 --wrap 'delo-llava benchmark --methods all --part $SLURM_ARRAY_TASK_ID/8'
  delo-llava benchmark --methods all --page-only --page docs/comparison.md"""
    add = parser.add_argument
    add("--task_seq", default="mini6", help="the sequence (default: %(default)s)")
    add(
        "--methods", nargs="+", default=["all"], metavar="METHOD",
        help="names, or `all`; options in quotes: 'hide --hide.cross_terms=true'; the first is the reference",
    )  # fmt: skip
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], help="(default: 0 1 2)")
    add(
        "--settings", nargs="+", choices=SETTINGS, default=["missing70", "complete"],
        help="what training and test records lack: nothing, or 70 %% of both kinds, of images, of text; "
        "`neutral`, `neutral70`: the first two with one wording for all tasks (the template of mini6, mini8)",
    )  # fmt: skip
    add(
        "--rates", nargs="+", type=_factor, default=[0.5, 1.0, 2.0, 4.0], metavar="FACTOR",
        help="of each method's own learning rate, tried on the first task's validation records; 1 alone "
        "keeps every rate (default: 0.5 1 2 4)",
    )  # fmt: skip
    add("--ranks", type=at_least(1), default=2, help="processes (GPUs) of a run (default: %(default)s)")
    add("--part", type=_part, default=(1, 1), metavar="I/N", help="every Nth method, from the Ith on")
    add("--output", type=user_path, default=Path("runs/benchmark"), help="(default: %(default)s)")
    add("--page", type=user_path, help="the page to write (default: comparison.md in the output folder)")
    add("--note", default="", help="a sentence that the page begins with, such as what else the machine did")
    add("--page-only", action="store_true", help="train nothing: tables of what is finished")


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/4 … 4/4")
    return part, parts


def run(options: argparse.Namespace) -> int:
    """Choose rates, run what is not finished, write the page.

    Raises:
        DeloError: an unknown method, key or value, before anything is trained; or no validation records.
    """
    from delo_llava.cluster.benchmark import Benchmark, entries

    signals.install()
    listed = entries(options.methods)
    plan = Benchmark(
        options.task_seq, listed, options.seeds, options.settings, options.output, options.rates, options.rest
    )
    plan.check_settings()
    for entry in listed:
        plan.rates(entry, 1.0)  # reads every word
    if len(plan.factors) > 1 and not options.page_only:
        plan.write_first()
    part, parts = options.part
    failed = [] if options.page_only else _run_all(plan, listed[part - 1 :: parts], options.ranks)
    page = options.page or options.output / "comparison.md"
    say(_pages().write_page(plan, page, options.note))
    for folder in failed:
        sys.stderr.write(f"error: {folder} did not come to its end; what it said stands above\n")
    return 1 if failed else 0


def _pages() -> Any:
    """What reads runs and writes of them; the library knows the harness by name only."""
    return importlib.import_module("delo_eval.compare.benchmark")


def _run_all(plan: "Benchmark", listed: Sequence["Entry"], ranks: int) -> list[Path]:
    """Trials, then runs, of some of the methods; returns the folders of those that failed."""
    from delo_llava.cluster.benchmark import ask_general, ask_in_one_wording, time_decoding

    tried = plan.factors if len(plan.factors) > 1 else ()
    clock = _Clock(len(listed) * (len(plan.settings) * len(plan.seeds) + len(tried)), ranks)
    failed: list[Path] = []
    for entry in listed:
        failed += clock.failures(plan.trial(entry, factor) for factor in tried)
        factor = _pages().chosen_factor(plan, entry) if tried else plan.factors[0]
        runs = plan.runs(entry, factor)
        failed += clock.failures(runs)
        for planned in (planned for planned in runs if planned.finished):
            codes = [ask_in_one_wording(planned)] if _pages().lacks_wording(planned) else []
            stages = ("zero-shot", "last") if plan.keeps_aside else ()
            codes += [ask_general(planned, s) for s in stages if _pages().lacks_general(planned, s)]
            if any(codes):
                failed.append(planned.folder)
        timed = [run for run in runs if run.finished] if _pages().lacks_decoding(plan, entry) else []
        if timed and time_decoding(timed[0], plan.decoding_file(entry)):
            failed.append(timed[0].folder)
    return failed


class _Clock:
    """Runs one after the other, and says which of how many it is and when the last may be done."""

    def __init__(self, total: int, ranks: int) -> None:
        self.total, self.ranks, self.count, self.spent, self.trained = total, ranks, 0, 0.0, 0

    def failures(self, runs: Iterable["Planned"]) -> list[Path]:
        """Run them; the folders of those that did not come to their end. A finished one is not touched."""
        return [planned.folder for planned in runs if not self._run(planned)]

    def _run(self, planned: "Planned") -> bool:
        from delo_llava.cluster.benchmark import launch

        self.count += 1
        if planned.finished:
            planned.require_same()
            return True
        left = ""
        if self.trained:
            minutes = self.spent / self.trained * (self.total - self.count + 1) / 60
            left = f", about {minutes:.0f} min left"
        say(f"[{self.count}/{self.total}{left}] {planned.folder}\n")
        sys.stdout.flush()
        began = time.monotonic()
        code = launch(planned, self.ranks)
        self.spent, self.trained = self.spent + time.monotonic() - began, self.trained + 1
        return code == 0 and planned.finished


COMMAND = Command(arguments, run, keys=True)
