"""Sort the wrong answers of a run by kind (empty, wrong format, off by one, ...) and show confusions."""

import argparse

from delo_llava.commands.base import Command, say
from delo_llava.files import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which predictions."""
    parser.add_argument(
        "--run", required=True, type=user_path, help="folder with predictions/ and results.json"
    )
    parser.add_argument(
        "--stage", help="its name (a task's), index from 0, or zero-shot (default: the last one)"
    )
    parser.add_argument("--pattern", default="run", help="missing pattern (default: %(default)s)")
    parser.add_argument("--mode", choices=("matched", "oracle"), help="default: as the method is judged")
    parser.add_argument("--output", type=user_path, help="JSON file (default: <run>/errors.json)")


def run(options: argparse.Namespace) -> int:
    """Read, show and write.

    Raises:
        DeloError: no results, a stage that was not evaluated, or damaged predictions.
    """
    from delo_eval.answers.errors import confusion_lines, errors_table, run_errors, write_errors
    from delo_eval.compare.runs import load_runs
    from delo_eval.tables import show
    from delo_llava.errors import DeloError

    (found,) = load_runs([options.run])
    stage = found.stage
    if options.stage is not None:
        known = {word: i for word, i in found.plan.by_word.items() if min(0, found.stage) <= i <= found.stage}
        if options.stage not in known:
            raise DeloError("This stage is not evaluated.", given=options.stage, allowed=known)
        stage = known[options.stage]
    mode, tasks = options.mode or found.mode, found.plan.judged(stage)
    errors = run_errors(found.folder, stage, tasks, pattern=options.pattern, oracle=mode == "oracle")
    title = f"wrong answers after {found.plan.label(stage)}, pattern {options.pattern}, {mode}"
    show(errors_table(errors, title), *confusion_lines(errors))
    file = options.output or options.run / "errors.json"
    write_errors(file, errors, stage=stage, pattern=options.pattern, mode=mode)
    say(f"{file}\n")
    return 0


COMMAND = Command(arguments, run)
