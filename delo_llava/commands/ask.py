"""Ask a run's stages a question of your own; all stages side by side show what was forgotten."""

import argparse
import importlib
import json
import sys

from delo_llava.commands.base import Command, at_least, say
from delo_llava.files import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The question and who answers it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """  delo-llava ask --run runs/x --image cat.png "what is it?"
  delo-llava ask --run runs/x --stages all --context "seen in 2021" "what is it?"
  delo-llava ask --run runs/x --json - < questions.jsonl     # lines: text, or {"question", "image", …}"""
    add = parser.add_argument
    add("question", help="or `-`: one a line from standard input")
    add("--run", required=True, type=user_path, help="folder of the run")
    add("--image", type=user_path, help="a picture; without one it counts as missing")
    add("--context", help="a caption or other text beside the picture; without one it counts as missing")
    add("--task", help="the task to answer as (default: the method chooses)")
    add(
        "--stages", "--stage", default="last", metavar="STAGE[,STAGE…]",
        help="names, indices, zero-shot, last, or all: the base and every stage (default: %(default)s)",
    )  # fmt: skip
    add("--max_new_tokens", type=at_least(1), default=128, help="(default: %(default)s)")
    add("--device", help="auto, cpu or cuda (default: the run's)")
    add("--json", action="store_true", help="one JSON object a line instead of tables")


def run(options: argparse.Namespace) -> int:
    """Read, ask, show.

    Raises:
        DeloError: no such run, stage, task or picture, or lines that are no questions.
    """
    harness = importlib.import_module("delo_eval.harness.ask")
    if options.question == "-":
        asked = harness.read_asked(sys.stdin, options.image, options.context)
    else:
        asked = [harness.Asked(options.question, options.image, options.context)]
    replies = harness.ask(
        options.run, options.stages.split(","), asked, options.task, options.max_new_tokens, options.device
    )
    if options.json:
        for reply in replies:
            say(json.dumps(reply.to_json(), ensure_ascii=False) + "\n")
        return 0
    show, found = importlib.import_module("delo_eval.tables").show, list(replies)
    for number in range(len(asked)):
        show(harness.shown(found[number :: len(asked)]))
    return 0


COMMAND = Command(arguments, run)
