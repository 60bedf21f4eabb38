"""Show what records lost or gained between two stages or runs, and why: form, routing, style, knowledge."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delo_llava.commands.base import Command, at_least, say
from delo_llava.files import user_path

if TYPE_CHECKING:
    from delo_eval.answers.flips import TaskFlips
    from delo_eval.compare.runs import RunResults


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which two evaluations."""
    add = parser.add_argument
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """Examples:
  delo-eval flips --run runs/x                                # each task from its own stage to the last one
  delo-eval flips --run runs/x --before science --after yesno -n 5
  delo-eval flips --run runs/x --against runs/y               # from y to x, after their last stages"""
    add("--run", required=True, type=user_path, help="folder with predictions/ and results.json")
    add("--against", type=user_path, help="another run on the same records, which is what was before")
    add("--before", help="stage: its name (a task's), index from 0, or zero-shot (default: each task's own)")
    add("--after", help="stage (default: the last one)")
    add("--pattern", default="run", help="missing pattern (default: %(default)s)")
    add("--mode", choices=("matched", "oracle"), help="default: as the method is judged")
    add("-n", type=at_least(0), default=3, help="changed records shown of each task (default: %(default)s)")
    add("--output", type=user_path, help="JSON file with every change (default: <run>/flips.json)")


def run(options: argparse.Namespace) -> int:
    """Read, show and write.

    Raises:
        DeloError: no results, a stage that was not evaluated, other records, or damaged predictions.
    """
    from delo_eval.answers.flips import flips_table, write_flips
    from delo_eval.compare.runs import load_runs
    from delo_eval.tables import show

    runs = load_runs([options.run, *([options.against] if options.against else [])])
    found, earlier = runs[0], runs[-1]
    mode, after = options.mode or found.mode, _stage(found, options.after, found.stage)
    changed, what = _changes(options, found, earlier, after, mode)
    to = _name(found, after, options.against)
    title = f"what changed from {what} to {to}, pattern {options.pattern}, {mode}"
    show(flips_table(changed, title), *_lines(changed, options.n))
    file = options.output or options.run / "flips.json"
    write_flips(file, changed, before=what, after=found.plan.label(after), pattern=options.pattern, mode=mode)
    say(f"{file}\n")
    return 0


def _changes(
    options: argparse.Namespace, found: "RunResults", earlier: "RunResults", after: int, mode: str
) -> tuple[list["TaskFlips"], str]:
    """The changes of every task, and what they begin with."""
    from delo_eval.answers.flips import changes, forgotten
    from delo_eval.answers.predictions import prediction_file, read_predictions

    if options.before is None and not options.against:
        return forgotten(found.folder, found.plan, after, mode, options.pattern), "each task's own stage"
    before = _stage(earlier, options.before, earlier.stage)
    judged = found.plan.judged(after)
    tasks = [t for t in judged if t in earlier.plan.judged(before) or before < 0]
    then, now = (
        {task: read_predictions(prediction_file(of.folder, stage, options.pattern, task)) for task in asked}
        for of, stage, asked in ((earlier, before, tasks), (found, after, judged))
    )
    return changes(then, now, mode, options.mode or earlier.mode), _name(earlier, before, options.against)


def _stage(found: "RunResults", word: str | None, default: int) -> int:
    """The index of an evaluated stage.

    Raises:
        DeloError: there is none of this name.
    """
    from delo_llava.errors import DeloError

    if word is None:
        return default
    known = {name: i for name, i in found.plan.by_word.items() if i <= found.stage}
    if word not in known:
        raise DeloError("This stage is not evaluated.", given=word, allowed=known)
    return known[word]


def _name(found: "RunResults", stage: int, against: Path | None) -> str:
    return f"{found.name}, {found.plan.label(stage)}" if against else found.plan.label(stage)


def _lines(changes: Sequence["TaskFlips"], count: int) -> Iterable[str]:
    """The first changes of each task, as lines; what was answered is never markup."""
    from rich.markup import escape

    for of in changes:
        for flip in of.flips[:count]:
            cause = f"lost by {flip.cause}" if flip.cause else "gained"
            missing = [word for word, shown in flip.presence.items() if not shown]
            without = f", without {' and '.join(missing)}" if missing else ""
            said = f"{flip.before or '(empty)'} → {flip.after or '(empty)'}, right: {flip.answer}"
            yield escape(f"{of.task} {flip.record_id}{without}: {said} ({cause})")


COMMAND = Command(arguments, run)
