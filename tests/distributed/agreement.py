"""Two ranks under every ZeRO stage against one process: what a method's hooks give, and batches with images
on some ranks only.

    python tests/distributed/agreement.py methods     # the reference methods: stages x accumulation x ranks
    python tests/distributed/agreement.py images      # every pair of image patterns in consecutive steps

Each prints a table (Markdown) of the largest differences. The `worker` form is one rank of the second.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import training_support as support  # noqa: E402
from distributed_support import ZEROS, engine_words, largest_difference, write_split_file  # noqa: E402

PLUGINS = HERE.parent / "plugins"
METHODS = {
    "projected": ["--projected.rank=2"],
    "ewc_small": ["--ewc_small.rank=2", "--ewc_small.strength=1000"],
    "replay_small": ["--replay_small.rank=2"],
    "prefix_small": [],
}
#: Name of an accumulation -> micro-batch (the global batch is 8).
ACCUMULATIONS = {"2 passes": 2, "4 passes": 1}
#: Which of the two passes' (rank 0, rank 1) have an image; `x` is an image that cannot be read.
PATTERNS = [a + b for a, b in itertools.product(("00", "10", "01", "11"), repeat=2)]


# ---- methods ----
def method_jobs(
    folder: Path, methods: Sequence[str], stages: Sequence[str], micro: int
) -> list[dict[str, Any]]:
    """Runs of the reference methods on the tiny sequence, as `training_support` takes them."""
    import tiny_models

    jobs = []
    for method, zero in itertools.product(methods, stages):
        output = folder / f"{method}-{zero}-{micro}"
        given = support.words(folder / "tiny.yaml", tiny_models.session("llava"), output)
        words = [word for word in given if not word.startswith(("--method", "--lora"))]
        words += [
            f"--method={method}",
            *METHODS[method],
            *engine_words(folder, zero),
            f"--train.micro_batch={micro}",
        ]
        jobs.append({"words": words})
    return jobs


def run_methods(folder: Path, methods: Sequence[str], stages: Sequence[str], micros: Sequence[int]) -> None:
    """One process and two ranks under each stage, into folders `<method>-<zero>-<micro>`."""
    os.environ["DELO_LLAVA_PLUGINS"] = str(PLUGINS)
    support.write_sequence(folder, records=13)
    write_split_file(folder)
    several = [job for micro in micros for job in method_jobs(folder, methods, stages, micro)]
    assert support.launch(several, folder, ranks=2) == [0, 0]
    assert support.launch(method_jobs(folder, methods, ["none"], 8), folder) == [0]


def differences(folder: Path, method: str, zero: str, micro: int) -> tuple[float, float]:
    """The largest differences of losses and of adapters' tensors to one process."""
    alone, found = folder / f"{method}-none-8", folder / f"{method}-{zero}-{micro}"
    pairs = list(zip(support.metrics(alone), support.metrics(found), strict=True))
    losses = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    return losses, largest_difference(alone, found)


# ---- images ----
def pairs_in_a_row(patterns: Sequence[str]) -> list[str]:
    """A sequence in which every ordered pair of patterns stands somewhere, one after the other."""
    left = {(a, b) for a in patterns for b in patterns}
    row = [patterns[0]]
    while left:
        here = row[-1]
        following = [b for b in patterns if (here, b) in left]
        if following:
            # Staying comes last, so that the walk does not run dry early.
            step = max(following, key=lambda b: (b != here, sum((b, c) in left for c in patterns)))
        else:
            step = next(a for a, _ in sorted(left))
        left.discard((here, step))
        row.append(step)
    return row


def write_images_job(folder: Path, row: Sequence[str], method: str, zeros: Sequence[str]) -> Path:
    """The job file of `images_worker`."""
    import tiny_models

    path = folder / "images.json"
    job = {
        "row": list(row),
        "method": method,
        "zeros": list(zeros),
        "model": str(tiny_models.session("llava")),
    }
    path.write_text(json.dumps(job | {"folder": str(folder)}))
    return path


def run_images(
    folder: Path, row: Sequence[str], method: str, zeros: Sequence[str]
) -> dict[str, list[list[float]]]:
    """(loss, gradient norm) of every step, for two ranks under each of `zeros` and for one process
    (`none`).
    """
    support.write_sequence(folder)
    write_split_file(folder)
    for chosen, ranks in ((list(zeros), 2), (["none"], 1)):
        job = write_images_job(folder, row, method, chosen)
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(support.free_port())}
        children = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "worker", str(job)],
                env={**os.environ, "OMP_NUM_THREADS": "1"}
                | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            )
            for rank in range(ranks)
        ]
        assert [child.wait(1800) for child in children] == [0] * ranks
    return {zero: json.loads((folder / f"images-{zero}.json").read_text()) for zero in ("none", *zeros)}


def images_worker(job: dict[str, Any]) -> None:
    """One rank: a stage whose every step has the images that a pattern says."""
    import torch

    from delo_llava.backbones.base import find_backbone
    from delo_llava.config import load_config
    from delo_llava.data.recipe import load_sequence
    from delo_llava.engines.ranks import start_ranks
    from delo_llava.methods.base import Part, Stage
    from delo_llava.registry import load_plugin
    from delo_llava.training import mixture
    from delo_llava.training.fit import Kit, Silent, fit, seed_everything

    linear = torch.nn.functional.linear
    folder, row = Path(job["folder"]), job["row"]
    task = load_sequence(str(folder / "tiny.yaml"), folder).tasks[0]
    examples = patterned(task, row)
    count = len(row[0])
    mixture.step_batches = lambda *_, **__: [  # type: ignore[assignment]
        list(range(count * step, count * (step + 1))) for step in range(len(row))
    ]
    mixture.deal = in_order
    for zero in job["zeros"]:
        small = ["--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--delo.cross_modal=identity"]
        more = ["--delo.consistency=0.5", "--delo.align=0.1"] if job["method"] == "delo" else []
        words = support.words(
            folder / "tiny.yaml", Path(job["model"]), folder / "x", *engine_words(folder, zero)
        )
        words = [w for w in words if not w.startswith(("--method", "--lora"))]
        words += [
            f"--method={job['method']}",
            "--lora.rank=2",
            *small,
            *more,
            f"--train.global_batch={count}",
        ]
        words += [
            "--train.micro_batch=1", "--train.warmup=0", "--train.lr=0.001", "--data.on_bad_image=skip",
            "--data.max_bad_images=99", "--missing.ratio=0",
        ]  # fmt: skip
        config = load_config(None, words)
        ranks = start_ranks(config)
        backbone, path = find_backbone(config.model)
        kind: Any = load_plugin("method", config.method)
        method = kind(kind.Config(**config.methods[config.method]), config, backbone)
        seed_everything(5)
        base = backbone.load(path, quant="none", device="cpu")
        base.config.get_text_config().use_cache = False
        model = method.begin(base, Stage(0, "task0", (task,), seed=5)).train()
        silent = Silent()
        kit = Kit(backbone, backbone.load_processor(path))
        fit(model, method, (Part(examples),), config, ranks, kit, seed=5, observe=lambda _, it=silent: it)
        assert torch.nn.functional.linear is linear, "an engine leaves the process as it was"
        left = [n for p in model.parameters() for n in vars(p) if n.startswith(("ds_", "_hp", "_z3"))]
        assert not left and all(p.numel() for p in model.parameters()), "and the module plain and whole"
        if ranks.first:
            told = [[report.loss, report.grad_norm] for report in silent.reports]
            (folder / f"images-{zero}.json").write_text(json.dumps(told))


def patterned(task: Any, row: Sequence[str]) -> Any:
    """Four examples a step, in the order pass 0 rank 0, pass 0 rank 1, pass 1 rank 0, …, with images as
    told.
    """
    import numpy as np

    from delo_llava.data.examples import Examples
    from delo_llava.data.readers import read_records

    known = list(read_records(task, "train"))
    broken = known[0].image.parent / "broken.png"
    broken.write_bytes(b"no picture")
    records, presence = [], []
    for number, sign in enumerate("".join(row)):
        record = known[number % len(known)]
        fields = {name: getattr(record, name) for name in type(record).__slots__} | {"id": f"r{number}"}
        records.append(type(record)(**(fields | ({"image": broken} if sign == "x" else {}))))
        presence.append((sign != "0", True))
    return Examples(((records, np.array(presence)),))


def in_order(step: Sequence[int], images: Sequence[bool], world: int, micro: int) -> list[list[list[int]]]:
    """A global batch shared out as it stands, images or not."""
    size = world * micro
    groups = [list(step[start : start + size]) for start in range(0, len(step), size)]
    return [[group[rank::world] for group in groups] for rank in range(world)]


# ---- tables ----
def method_table() -> Iterator[str]:
    """The agreement of every reference method, stage, accumulation, on two ranks and on one under ZeRO."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_methods(folder, list(METHODS), ZEROS, list(ACCUMULATIONS.values()))
        yield f"| method | {' | '.join(f'ZeRO {zero}, {acc}' for zero in ZEROS for acc in ACCUMULATIONS)} |"
        yield f"|---|{'---|' * len(ZEROS) * len(ACCUMULATIONS)}"
        for method in METHODS:
            cells = [differences(folder, method, z, m) for z in ZEROS for m in ACCUMULATIONS.values()]
            yield f"| {method} | {' | '.join(f'{loss:.0e}, {weight:.0e}' for loss, weight in cells)} |"


def image_table(methods: Sequence[str] = ("lora", "delo")) -> Iterator[str]:
    """Every ordered pair of patterns."""
    row = pairs_in_a_row(PATTERNS)
    yield f"| method | steps | {' | '.join(f'ZeRO {zero}' for zero in ZEROS)} |"
    yield f"|---|---|{'---|' * len(ZEROS)}"
    for method in methods:
        with tempfile.TemporaryDirectory() as name:
            found = run_images(Path(name), row, method, ZEROS)
        cells = [max(abs(a[0] - b[0]) for a, b in zip(found["none"], found[z], strict=True)) for z in ZEROS]
        yield f"| {method} | {len(row)} | {' | '.join(f'{cell:.0e}' for cell in cells)} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("methods", "images"))
    lines = method_table() if parser.parse_args().what == "methods" else image_table()
    for line in lines:
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        images_worker(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main()
