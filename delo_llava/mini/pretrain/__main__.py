"""`python -m delo_llava.mini.pretrain --output DIR`: tokenizer, tower, text, joint and export, each
resumable and each on its own.

The tower and the text stage need nothing of each other: run them as two processes of one thread each, then
`--stage joint`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from delo_llava.mini.pretrain import corpus, export, joint, language, pictures, tokenizer, tower
from delo_llava.mini.pretrain.loop import Plan, Stage

VOCABULARY = 2500
PICTURES, HELD_OUT = 36_000, 1_500
STAGES = ("tower", "text", "joint", "all")


def plans(scale: float) -> dict[str, Plan]:
    """Each stage's length and rate; `scale` shortens all of them alike (for tests)."""
    return {
        "tower": Plan(max(2, round(5000 * scale)), 15 * scale, rate=1.5e-3, measure_every=500),
        "text": Plan(
            max(2, round(4600 * scale)), 14 * scale, rate=3e-3, floor=0.1, warmup=60, measure_every=200
        ),
        "joint": Plan(max(2, round(7000 * scale)), 26 * scale, rate=1.5e-3, warmup=100, measure_every=500),
    }


def make_pools(folder: Path, seed: int, scale: float) -> tuple[pictures.Pool, pictures.Pool]:
    """The training pictures and a few held-out drawings (other places, sizes, words and grain)."""
    share = min(1.0, scale)
    return (
        pictures.cached_pool(folder / "train", seed, max(200, round(PICTURES * share))),
        pictures.cached_pool(folder / "held_out", seed + 1000, max(100, round(HELD_OUT * share))),
    )


def make_tokenizer(folder: Path, seed: int) -> None:
    """Train the tokenizer unless it is there."""
    if not (folder / "tokenizer.model").exists():
        tokenizer.train(corpus.lines(seed), VOCABULARY, folder)


def finish(
    model: joint.LlavaForConditionalGeneration, words: Path, output: Path, scale: float, seed: int
) -> None:
    """Export to `output/mini_llava` what the three stages made."""
    stages = {
        name: json.loads((output / name / "done.json").read_text(encoding="utf-8"))
        for name in ("tower", "text", "joint")
    }
    recipe = {
        "command": f"python -m delo_llava.mini.pretrain --output DIR --scale {scale} --seed {seed}",
        "seed": seed,
        "vocabulary": VOCABULARY,
        "pictures": {"count": PICTURES, "kinds": pictures.KINDS, "hidden": pictures.HIDDEN},
        "joint rows": {"picture": joint.PICTURE_ROWS, "text": joint.TEXT_ROWS},
        "plans": {name: asdict(plan) for name, plan in plans(scale).items()},
    }
    export.export(
        model, tokenizer.load(words), words, output / "mini_llava", recipe, {"seed": seed, "stages": stages}
    )


def main() -> None:
    """Parse the command line and run the stages asked for, in order."""
    parser = argparse.ArgumentParser(prog="delo_llava.mini.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="length of all stages relative to the shipped run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    planned, words = plans(options.scale), options.output / "tokenizer"
    make_tokenizer(words, options.seed)
    if options.stage == "text":
        language.run(Stage(options.output / "text"), tokenizer.load(words), planned["text"], options.seed)
        return
    pools = make_pools(options.output / "pictures", options.seed, options.scale)
    seen = tower.run(Stage(options.output / "tower"), *pools, planned["tower"], options.seed)
    if options.stage == "tower":
        return
    said = language.run(Stage(options.output / "text"), tokenizer.load(words), planned["text"], options.seed)
    model = joint.run(
        Stage(options.output / "joint"),
        seen,
        said,
        tokenizer.load(words),
        pools,
        planned["joint"],
        options.seed,
    )
    finish(model, words, options.output, options.scale, options.seed)


if __name__ == "__main__":
    main()
