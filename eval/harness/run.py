"""`delo-eval`: evaluate a saved stage of a run, alone or on several ranks."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from delo_eval.harness.folder import AS_STORED, Request, RunFolder, open_folder
from delo_eval.harness.unchanged import unchanged_stage
from delo_eval.matrix.accuracy import ZERO_SHOT, stage_name
from delo_eval.matrix.plots import PLOTS, draw_changed
from delo_eval.matrix.results import read_results
from delo_eval.matrix.table import final_table, stage_table
from delo_llava.commands.base import at_least, listed
from delo_llava.data.missing import PATTERNS
from delo_llava.data.omitted import evaluated_lines
from delo_llava.engines.launched import launched, speaks
from delo_llava.errors import DeloError
from delo_llava.files import user_path
from delo_llava.registry import plugin_names, plugin_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the stages that the words name and return the exit code.

    Raises:
        DeloError: a mistake in the words, or in the run.
    """
    arguments = _parser().parse_args(argv)
    given = arguments
    request = Request(
        given.split, _patterns(given.patterns), given.limit, given.batch_size, given.output,
        False if given.no_cache else None, given.root, given.wording, given.general or None,
    )  # fmt: skip
    evaluate_stages(arguments.run, arguments.stage, request)
    return 0


def evaluate_stages(
    folder: Path, word: str, request: Request = AS_STORED, quiet: bool = False
) -> dict[str, Any] | None:
    """Evaluate the stages of a run that `word` names (`stages_named`), and show what came out.

    Args:
        quiet: show nothing.

    Returns:
        the content of results.json; None on ranks but the first.

    Raises:
        DeloError: no such run or stage, or one that cannot be evaluated as asked.
    """
    run = open_folder(folder, request)
    stages = stages_named(word, run)
    before, console = read_results(run.output), Console(quiet=quiet or not speaks())
    content = _unchanged(run, stages, request, console) or _evaluate(run, stages, request, console)
    if content is not None:
        draw_changed(before, content, run.output / PLOTS)
        _tell(run, stages, content, console)
    return content


def evaluate_stage(run_dir: Path, stage: int, **options: Any) -> dict[str, Any] | None:
    """`delo_eval.harness.stage.evaluate_stage`, imported when it is called: it needs torch."""
    from delo_eval.harness.stage import evaluate_stage as evaluate

    return evaluate(run_dir, stage, **options)


def stages_named(word: str, run: RunFolder) -> list[int]:
    """The stages that `--stage` means: an index from 0, its name (most often a task's), `last`, `all` or
    `zero-shot`; where no stage is planned, `last` and `all` are the base.

    Raises:
        DeloError: none of these, or nothing is trained yet.
    """
    names = run.plan.names
    trained = [i for i, name in enumerate(names) if run.store.adapter(name).is_dir()]
    if word in ("last", "all") and names and not trained:
        raise DeloError("No stage of this run is trained yet.", given=run.store.root)
    results = trained if names else [ZERO_SHOT]
    named = {"last": results[-1:], "all": results}
    named |= {name: [stage] for name, stage in run.plan.by_word.items()}
    if word not in named:
        raise DeloError("There is no such stage.", given=word, allowed=named)
    return named[word]


def _unchanged(
    run: RunFolder, stages: Sequence[int], request: Request, console: Console
) -> dict[str, Any] | None:
    """The results, if every stage is evaluated already and nothing changed since; only then without torch."""
    if launched().world != 1:
        return None
    content = None
    for stage in stages:
        content = unchanged_stage(run.store.root, stage, request)
        if content is None:
            return None
    if content is not None:
        console.print("nothing has changed since these stages were evaluated")
    return content


def _evaluate(
    run: RunFolder, stages: Sequence[int], request: Request, console: Console
) -> dict[str, Any] | None:
    """Evaluate the stages; the first rank shows progress and gets the results."""
    from delo_eval.harness.ranks import launched_ranks

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    content = None
    with launched_ranks(run.config) as ranks:
        for stage in stages:
            with Progress(*columns, console=console, transient=True) as bars:
                bar = bars.add_task("loading")
                content = evaluate_stage(
                    run.store.root, stage, request=request, ranks=ranks,
                    progress=partial(_advance, bars, bar),
                )  # fmt: skip
    return content


def _tell(run: RunFolder, stages: Sequence[int], content: dict[str, Any], console: Console) -> None:
    """Tables of the stages and of the whole run, and where it is written."""
    for stage in stages:
        console.print(stage_table(content, stage))
        for line in evaluated_lines(content, stage_name(stage)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(final_table(content))
    counts = content["seconds"]["answers"]
    told = (
        f"{run.plan.label(stage)}: {counts[stage_name(stage)]['stored']} / {counts[stage_name(stage)]['new']}"
        for stage in stages
    )
    console.print(f"answers, known / new: {', '.join(told)}")
    console.print(f"results: {run.output / 'results.json'}", soft_wrap=True)


def _advance(bars: Progress, bar: TaskID, cell: str, done: int, total: int) -> None:
    """Show how far one cell is."""
    bars.update(bar, description=cell, completed=done, total=total)


def _patterns(given: str | None) -> tuple[str, ...] | None:
    """Comma-separated missing patterns.

    Raises:
        DeloError: an unknown one.
    """
    if given is None:
        return None
    names = tuple(given.split(","))
    for name in names:
        if name not in PATTERNS:
            raise DeloError("Unknown missing pattern.", given=name, allowed=PATTERNS)
    return names


def _further_commands() -> str:
    """What `delo-eval COMMAND` does besides, and an example."""
    names = plugin_names("eval_command")
    commands = listed([(name, plugin_summary("eval_command", name)) for name in names], indent=2)
    return (
        f"further commands (delo-eval COMMAND --help):\n{commands}\n"
        "example: delo-eval --run runs/x --stage all --patterns run,complete"
    )


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="delo-eval", description=__doc__, epilog=_further_commands(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # torchrun takes --run for an abbreviation of its own --run_path, wherever it stands: hence a second name.
    parser.add_argument(
        "--run", "--run_dir", dest="run", type=user_path, required=True, help="folder of the run"
    )
    parser.add_argument(
        "--stage", default="last", help="index from 0, its name (a task's), last (default), all, or zero-shot"
    )
    parser.add_argument(
        "--split", choices=("test", "val"), help="default: the run's own; another goes to <run>/eval-<split>"
    )
    parser.add_argument("--patterns", help="missing patterns, comma-separated: run, complete, image, text")
    parser.add_argument("--limit", type=at_least(1), help="records per task, for trials")
    parser.add_argument(
        "--wording", metavar="TEXT", help="asked in place of every instruction, to see what images and "
        "contexts alone tell (the choice of the task above all); goes to <run>/eval-wording",
    )  # fmt: skip
    parser.add_argument(
        "--general", action="store_true", help="also ask the tasks that the recipe keeps aside: what of the "
        "base's general ability these stages still have; goes to <run>/eval-general",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=at_least(1), help="questions decoded at once; results do not depend on it"
    )
    parser.add_argument(
        "--root", "--data.root", dest="root", type=user_path, help="where the data lies now, if it has moved"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        help="folder for predictions, plots and results.json; default: the run's own",
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="answer everything again; by default known answers are reused"
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # appended by the deepspeed launcher
    return parser
