"""Score an answer file of this or another project by a benchmark's rule, native and official."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from delo_llava.commands.base import Command, say
from delo_llava.errors import DeloError
from delo_llava.files import user_path

if TYPE_CHECKING:
    from delo_eval.answers.scoring import Scored
    from delo_eval.scorers.base import Reference, Scorer
    from delo_llava.data.recipe_file import TaskEntry

SCHEMA = "delo-llava/scores/1"

#: Short names of groups of tasks -> recipes; the first that has the task counts.
GROUPS = {
    "coin": ("coin8", "coin6", "coin_long10"),
    "dcl": ("mllm_dcl",),
    "smolora": ("smolora_cvit",),
    "food101": ("food101_cmml",),
    "mm_imdb": ("mm_imdb_cmml",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which answers, against what, by which rule."""
    parser.add_argument(
        "answers", nargs="+", help="files, a folder or a pattern; shards are <CHUNKS>_<IDX>.jsonl"
    )
    parser.add_argument("--task", help="<recipe>/<task>, such as coin/gqa; with --scorer any task's name")
    parser.add_argument("--scorer", help="a scorer's name (`delo-llava list scorers`); default: the recipe's")
    parser.add_argument(
        "--references", type=user_path, help="test or annotation file; default: the recipe's test file"
    )
    parser.add_argument("--key", help="key of the answer in each row, where the rows hold several texts")
    parser.add_argument(
        "--by-line", action="store_true", help="pair the n-th answer with the n-th question, whatever the ids"
    )
    parser.add_argument(
        "--repeated",
        choices=("refuse", "last", "each"),
        default="refuse",
        help="further answers to one question: refuse (default), keep the last, or count each",
    )
    parser.add_argument("--root", type=user_path, help="data root of the recipe")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--scoring", choices=("native", "compat"), help="one rule only; default: both")
    parser.add_argument(
        "--allow-missing", action="store_true", help="count questions without answer wrong, and say so"
    )
    parser.add_argument("--output", type=user_path, help="JSON with the scores")
    parser.add_argument("--records", type=user_path, help="JSON lines with the score of every question")


def run(options: argparse.Namespace) -> int:
    """Score, print a table, write the files asked for.

    Raises:
        DeloError: a mistake in the words, answers that do not fit the questions, or data that is missing.
    """
    from delo_eval.answers.files import answer_files, read_answers
    from delo_eval.answers.matching import match, match_by_line
    from delo_eval.answers.scoring import score_all
    from delo_llava.files import write_json_atomic, write_text_atomic

    subject, scorer, references, closed = _subject(options)
    answers = read_answers(answer_files(options.answers), key=options.key, by_line=options.by_line)
    said = set(answers.ids)
    asked = [each for each in references if scorer.is_counted(each) or each.id in said]
    if options.by_line:
        matched = match_by_line(answers, references, allow_missing=options.allow_missing)
    else:
        matched = match(answers, asked, allow_missing=options.allow_missing, repeated=options.repeated)
    scored = score_all(scorer, options.scoring, matched, closed)
    say(_table(subject, scored))
    if options.output:
        write_json_atomic(options.output, {"schema": SCHEMA, "subject": subject, **scored.to_json()})
    if options.records:
        write_text_atomic(options.records, "".join(_record_lines(scored)))
    return 0


def _subject(options: argparse.Namespace) -> tuple[str, "Scorer", list["Reference"], list[str]]:
    """What is scored, by which scorer, against which references; the closed set of answers, if any."""
    from delo_eval.answers.references import read_references
    from delo_llava.registry import load_plugin

    group, _, task = (options.task or "").rpartition("/")
    if not group and not options.scorer:
        raise DeloError(
            "What to score is not said.", given=options.task, fix="--task <recipe>/<task>, or --scorer NAME"
        )
    recipe, entry = _recipe_task(group, task) if group else ("", None)
    closed = [] if entry is None else entry.answers
    name = options.scorer or (entry.scorer if entry is not None else "")
    scorer = cast("Scorer", load_plugin("scorer", name))
    subject = f"{recipe}/{task}" if recipe else task or options.scorer
    if options.references:
        read = read_references(options.references, task, split=options.split, by_line=options.by_line)
        return subject, scorer, read, closed
    if not recipe:
        raise DeloError("A scorer alone has no questions.", fix="name them with --references FILE")
    return subject, scorer, _recipe_references(recipe, task, options), closed


def _recipe_task(group: str, task: str) -> tuple[str, "TaskEntry"]:
    """The recipe with the task, and the task as the recipe has it.

    Raises:
        DeloError: no such recipe, or none of the group has the task.
    """
    from delo_llava.data.recipe import read_recipe
    from delo_llava.registry import plugin_names

    known = plugin_names("recipe")
    names = (
        [group] if group in known else [name for name in GROUPS.get(group, ()) if name in known] or [group]
    )
    tasks: dict[str, tuple[str, TaskEntry]] = {}
    for name in names:
        for entry in read_recipe(name).tasks:
            tasks.setdefault(entry.name, (name, entry))
    if task not in tasks:
        raise DeloError(f"There is no such task in {', '.join(names)}.", given=task, allowed=tasks)
    return tasks[task]


def _recipe_references(recipe: str, task: str, options: argparse.Namespace) -> list["Reference"]:
    """The references of a recipe's task, as training reads its records."""
    from delo_eval.scorers.base import Reference
    from delo_llava.data.readers import read_records
    from delo_llava.data.recipe import load_task

    try:
        spec = load_task(recipe, task, options.split, options.root)
    except DeloError as error:
        alone = "name the file of the questions alone: --references FILE"
        fix = f"{error.fix}; or {alone}" if error.fix else alone
        raise DeloError(error.message, given=error.given, fix=fix) from error
    return [Reference.of(record) for record in read_records(spec, options.split)]


def _table(title: str, scored: "Scored") -> str:
    """What is printed."""
    matched = scored.matched
    lines = [
        f"{title}: {len(matched.answers.ids)} answers to {len(matched.references)} questions",
        f"read: {', '.join(map(str, matched.answers.columns))}",
    ]
    if matched.repeated:
        kept = "each counts" if len(matched.references) > len(set(matched.answers.ids)) else "the last counts"
        lines.append(f"{matched.repeated} answers are to questions that have one: {kept}")
    if matched.missing:
        treated = {"wrong": "counted wrong", "skipped": "left out"}
        told = [f"{treated[one.scorer.unanswered]} ({one.mode})" for one in scored.scores]
        lines.append(f"{len(matched.missing)} questions have no answer: {' and '.join(told)}")
    rows = [("mode", "scorer", "score", "± s.e.", "questions")]
    for one in scored.scores:
        error = "–" if one.standard_error is None else f"{one.standard_error:.2f}"
        rows.append((one.mode, one.scorer.id, f"{one.score:.2f}", error, str(one.count)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for mode, scorer, *numbers in rows:
        figures = (f"{text:>{width}}" for text, width in zip(numbers, widths[2:], strict=True))
        lines.append(f"{mode:<{widths[0]}}  {scorer:<{widths[1]}}  {'  '.join(figures)}")
    lines += [f"  {name}: {value:.2f}" for name, value in scored.scores[0].details.items()]
    if floor := scored.scores[0].floor:
        chance = "" if floor.chance is None else f", chance {floor.chance:.2f}"
        lines.append(f"blind ({floor.scorer}): always {floor.answer[:40]!r} {floor.majority:.2f}{chance}")
    if scored.refused:
        lines.append(f"not scored: {scored.refused}")
    if found := scored.following:
        share = f"{found['score']:.2f} of {found['records']} questions"
        lines.append(f"instruction followed ({found['scorer']}): {share}")
    lines += [f"note: {note}" for note in scored.notes]
    return "\n".join(lines) + "\n"


def _record_lines(scored: "Scored") -> Iterator[str]:
    """A line for every question, in the order of the references.

    For a rule by position the score is that of the answer at the question's place, not of its own.
    """
    pairs = zip(scored.matched.references, scored.matched.texts, strict=True)
    for i, (reference, text) in enumerate(pairs):
        row = {"question_id": reference.id, "prediction": text, "answer": reference.answer}
        yield (
            json.dumps(row | {one.mode: one.records[i] for one in scored.scores}, ensure_ascii=False) + "\n"
        )


COMMAND = Command(arguments, run)
