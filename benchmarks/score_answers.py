"""Time of `delo-eval score` for a large answer file: reading, matching, scoring by both rules, writing.

    python benchmarks/score_answers.py --records 100000

Makes answers and references of each kind (seeded), runs the command in a process of its own, and prints a
table to stderr and JSON to stdout: wall and processor seconds, memory. Exits 1 where a run takes more than
`--limit` seconds of processor time (wall time depends on what else the machine does). Captions are measured
only when named: their library takes about a second of processor time per thousand records.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = "red blue dark green tabby cat two left a dog Yes. no, one 1,000 don't south-west"
WORDS = VOCABULARY.split()
ASK = "What is it?\nAnswer the question using a single word or phrase."

#: A maker draws (what a reference holds, what is answered).
Maker = Callable[[random.Random], tuple[dict[str, Any], str]]


def phrase(draw: random.Random) -> str:
    """One to three words and often a number, so that texts rarely repeat."""
    said = draw.choices(WORDS, k=draw.randint(1, 3))
    return " ".join([*said, *([str(draw.randrange(10**6))] if draw.random() < 0.5 else [])])


def exact(draw: random.Random) -> tuple[dict[str, Any], str]:
    """One answer, met half the time."""
    answer = phrase(draw)
    return {"answer": answer}, answer.upper() if draw.random() < 0.5 else phrase(draw)


def ten_answers(draw: random.Random) -> tuple[dict[str, Any], str]:
    """Ten human answers, most of them different texts."""
    answers = [phrase(draw) for _ in range(10)]
    return {"answer": answers[0], "answers": answers}, draw.choice([*answers, phrase(draw)])


def box(draw: random.Random) -> tuple[dict[str, Any], str]:
    """A box in shares of the side."""

    def drawn() -> str:
        x, y = draw.random() / 2, draw.random() / 2
        return f"[{x:.3f}, {y:.3f}, {x + 0.3:.3f}, {y + 0.4:.3f}]"

    return {"answer_bbox": drawn(), "size": [640, 480]}, drawn()


def letter(draw: random.Random) -> tuple[dict[str, Any], str]:
    """A letter, bare or in a sentence."""
    said = draw.choice("ABCD")
    return {"answer": draw.choice("ABCD")}, draw.choice(
        [said, f"The answer is {said}.", f"I think it is {said}"]
    )


def caption(draw: random.Random) -> tuple[dict[str, Any], str]:
    """Five captions of some words."""
    captions = [" ".join(draw.choices(WORDS, k=10)) for _ in range(5)]
    return {"answer": captions[0], "captions": captions}, " ".join(draw.choices(WORDS, k=10))


MAKERS: dict[str, Maker] = {
    "gqa": exact, "ocrvqa": exact, "imagenet": exact, "contains": exact, "mllm_dcl_rs": exact,
    "relaxed_accuracy": exact, "textvqa": ten_answers, "vqav2": ten_answers, "vizwiz": ten_answers,
    "anls": ten_answers, "grounding": box, "scienceqa": letter, "multilabel_f1": exact,
    "caption_plain": caption,
}  # fmt: skip


def write_files(folder: Path, make: Maker, records: int) -> list[str]:
    """A file of references and two shards of answers; returns the words that name them."""
    draw = random.Random(0)
    entries: list[dict[str, Any]] = []
    shards: tuple[list[str], list[str]] = ([], [])
    for i in range(records):
        truth, said = make(draw)
        entries.append({"question_id": i, "image": f"images/{i}.jpg", "text": ASK, **truth})
        row = {"question_id": i, "prompt": ASK, "text": said, "model_id": "m", "metadata": {}}
        shards[2 * i // records].append(json.dumps(row) + "\n")
    (folder / "test.json").write_text(json.dumps(entries))
    for index, shard in enumerate(shards):
        (folder / f"2_{index}.jsonl").write_text("".join(shard))
    return [str(folder), "--references", str(folder / "test.json")]


def timed(words: list[str]) -> dict[str, float]:
    """Run the command; wall and processor seconds and peak memory of its process."""
    code = "import sys; from delo_eval.cli import main; sys.exit(main(sys.argv[1:]))"
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, "score", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"delo-eval score {' '.join(words)} failed")
    processor = used.ru_utime + used.ru_stime
    return {"wall_s": time.monotonic() - began, "cpu_s": processor, "peak_mib": used.ru_maxrss / 1024}


def main() -> int:
    """Measure every scorer asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    usual = [name for name in MAKERS if "caption" not in name]
    parser.add_argument("--scorers", nargs="+", choices=MAKERS, default=usual)
    parser.add_argument("--limit", type=float, default=20.0, help="processor seconds that no run may exceed")
    args = parser.parse_args()
    rows = []
    sys.stderr.write(f"{'scorer':<18}{'wall s':>8}{'cpu s':>8}{'MiB':>7}\n")
    for scorer in args.scorers:
        with tempfile.TemporaryDirectory() as name:
            words = write_files(Path(name), MAKERS[scorer], args.records)
            output = ["--output", f"{name}/scores.json", "--records", f"{name}/records.jsonl"]
            found = timed([*words, "--scorer", scorer, *output])
        rows.append({"scorer": scorer, **found})
        sys.stderr.write(f"{scorer:<18}{found['wall_s']:8.1f}{found['cpu_s']:8.1f}{found['peak_mib']:7.0f}\n")
    content = {"records": args.records, "limit_s": args.limit, "runs": rows}
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
    return int(any(row["cpu_s"] > args.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
