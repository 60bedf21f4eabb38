"""`python -m tools.mini_base.pretrain --output DIR`: tokenizer, tower, text, joint and export, each
resumable and each on its own.

The tower and the text stage need nothing of each other: run them as two processes of one thread each, then
`--stage joint`.
"""

import argparse
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from delo_llava.backbones.base import SHIPPED
from delo_llava.extras import require_extra
from delo_llava.files import user_path
from tools.mini_base.command import run
from tools.mini_base.pretrain import corpus, export, family, joint, language, pictures, tower
from tools.mini_base.pretrain.loop import Plan, Stage

VOCABULARY = 2500
PICTURES, HELD_OUT = 36_000, 1_500
STAGES = ("tower", "text", "joint", "all")
LIMIT = 180.0
"""Minutes after which a full-length stage ends whatever its steps."""


def plans(scale: float, started: bool = False) -> dict[str, Plan]:
    """Each stage's length and rate.

    Args:
        scale: shortens all stages alike (for tests).
        started: language layers and the projector's aim are mini-llava's, so all stages may be short.
    """
    steps = (2400, 500, 2000) if started else (4300, 2900, 5600)
    tower_steps, text_steps, joint_steps = (max(2, round(n * scale)) for n in steps)
    limit, text_rate = LIMIT * max(scale, 0.01), 1.5e-3 if started else 3e-3
    return {
        "tower": Plan(tower_steps, limit, rate=1.5e-3, measure_every=500),
        "text": Plan(text_steps, limit, rate=text_rate, floor=0.1, warmup=60, measure_every=200),
        "joint": Plan(joint_steps, limit, rate=1.5e-3, warmup=100, measure_every=500),
    }


def make_pools(folder: Path, seed: int, scale: float) -> tuple[pictures.Pool, pictures.Pool]:
    """The training pictures and a few held-out drawings (other places, sizes, words and grain)."""
    share = min(1.0, scale)
    return (
        pictures.cached_pool(folder / "train", seed, max(200, round(PICTURES * share))),
        pictures.cached_pool(folder / "held_out", seed + 1000, max(100, round(HELD_OUT * share))),
    )


def make_tokenizer(made: family.Family, folder: Path, seed: int) -> family.Tongue:
    """The tokenizer, trained unless it is there."""
    if not folder.is_dir():
        made.train_tokenizer(corpus.lines(seed), VOCABULARY, folder)
    return made.load_tokenizer(folder)


def finish(options: argparse.Namespace, made: family.Family, model: Any, tongue: family.Tongue) -> None:
    """Export to `output/<the family's folder>` what the three stages made."""
    stages = {
        name: json.loads((options.output / name / "done.json").read_text(encoding="utf-8"))
        for name in ("tower", "text", "joint")
    }
    chosen = {name: getattr(options, name) for name in ("family", "start", "scale", "seed")}
    recipe = {
        "command": " ".join(
            ["python -m tools.mini_base.pretrain --output DIR", *(f"--{k} {v}" for k, v in chosen.items())]
        ),
        **chosen,
        "vocabulary": VOCABULARY,
        "pictures": {"count": PICTURES, "kinds": pictures.KINDS, "hidden": pictures.HIDDEN},
        "joint rows": {"picture": joint.PICTURE_ROWS, "text": joint.TEXT_ROWS},
        "plans": {n: asdict(p) for n, p in plans(options.scale, options.start != "scratch").items()},
    }
    words, folder = options.output / "tokenizer", options.output / made.folder
    export.export(made, model, tongue, words, folder, recipe, {"seed": options.seed, "stages": stages})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini_base.pretrain", description=__doc__)
    parser.add_argument("--output", type=user_path, required=True)
    parser.add_argument("--family", choices=family.NAMES, default="llava")
    parser.add_argument(
        "--start",
        choices=("scratch", "mini-llava"),
        default="scratch",
        help="what the language model begins with (`mini-llava`: for qwen, about half as long)",
    )
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="length of all stages relative to the shipped run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Parse the command line and run the stages asked for, in order."""
    options = parse()
    require_extra("mini-base", "Pretraining")
    torch.set_num_threads(options.threads)
    made, seed, output = family.find(options.family), options.seed, options.output
    started = options.start != "scratch"
    planned, start = plans(options.scale, started), None
    if started:
        start = Path(str(files("delo_llava").joinpath(SHIPPED[options.start])))
    tongue = make_tokenizer(made, output / "tokenizer", seed)
    if options.stage == "text":
        language.run(Stage(output / "text"), made, tongue, planned["text"], seed, start)
        return
    pools = make_pools(output / "pictures", seed, options.scale)
    seen = tower.run(Stage(output / "tower"), made, *pools, planned["tower"], seed)
    if options.stage == "tower":
        return
    said = language.run(Stage(output / "text"), made, tongue, planned["text"], seed, start)
    model = joint.run(Stage(output / "joint"), made, seen, said, tongue, pools, planned["joint"], seed, start)
    finish(options, made, model, tongue)


if __name__ == "__main__":
    run(main)
