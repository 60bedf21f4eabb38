"""Planned against measured memory of a training step: `delo-llava plan`'s simulation beside the real thing.

    python benchmarks/plan_memory.py                             # mini-llava on this machine
    python benchmarks/plan_memory.py --model llava-hf/llava-1.5-7b-hf --words 800 --rows 1 2 4   # on a GPU

On the CPU the profiler's allocations are summed; on CUDA the allocator's peak is read. Prints a table and
writes JSON.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from delo_llava.cluster.measure import measure_step
from delo_llava.cluster.memory import MemoryModel, Setup
from delo_llava.cluster.models import planned_model
from delo_llava.config import load_config
from delo_llava.files import user_path


def main() -> int:
    """Measure every combination asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-llava")
    parser.add_argument("--methods", nargs="+", default=["delo", "lora"])
    parser.add_argument("--quant", nargs="+", default=["none", "nf4"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8])
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--output", type=user_path, default=Path("plan_memory.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    rows = [
        compare(options.model, method, quant, checkpointing, micro, options.words)
        for method in options.methods
        for quant in options.quant
        for checkpointing in (False, True)
        for micro in options.rows
    ]
    options.output.write_text(json.dumps(rows, indent=1))
    table = Table("method", "quant", "recompute", "rows", "tokens", "measured MiB", "planned MiB", "ratio")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    return 0


def compare(
    model: str, method: str, quant: str, checkpointing: bool, micro: int, words: int
) -> dict[str, object]:
    """One combination: the measured peak of a step, the planned one, and their ratio."""
    config = load_config(
        None,
        [f"--model={model}", f"--method={method}", f"--quant={quant}", f"--train.micro_batch={micro}",
         f"--train.gradient_checkpointing={str(checkpointing).lower()}"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = measure_step(config, Path(folder) / "picture.png", words)
    import torch

    cuda = torch.cuda.is_available()
    memory = MemoryModel(planned_model(model, found.image_tokens), config, found.tokens, cuda, found.answers)
    planned = memory.step_bytes(Setup(quant, "none", checkpointing, micro, 1))
    return {
        "method": method, "quant": quant, "recompute": checkpointing, "rows": found.rows,
        "tokens": found.tokens, "measured": found.step / 2**20, "planned": planned / 2**20,
        "ratio": planned / found.step,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
