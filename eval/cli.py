"""`delo-eval`: a command of `eval/commands/`, or else the evaluation of a stored run."""

import sys
from collections.abc import Sequence

from delo_llava.commands.base import run_command
from delo_llava.endings import told
from delo_llava.engines import signals
from delo_llava.registry import plugin_names


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script `delo-eval`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in plugin_names("eval_command"):
        return told(run_command, "eval_command", words, "delo-eval")
    signals.install()
    from delo_eval.harness.run import main as evaluate

    return told(evaluate, words, goes_on=True)
