"""What tests that start several ranks share: engines by name, and how far two runs lie apart."""

import json
from pathlib import Path

#: ZeRO stages; in `3_split` no parameter is small enough to stay whole.
ZEROS = ("1", "2", "3", "3_split")


def write_split_file(folder: Path) -> Path:
    """The DeepSpeed file of `3_split`."""
    from delo_llava.registry import load_plugin

    shipped = json.loads(Path(str(load_plugin("zero", "3"))).read_text())
    shipped["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "3_split.json"
    path.write_text(json.dumps(shipped))
    return path


def engine_words(folder: Path, zero: str) -> list[str]:
    """The words that choose an engine."""
    return ["--zero=3", f"--ds_config={folder / '3_split.json'}"] if zero == "3_split" else [f"--zero={zero}"]


def largest_difference(one: Path, two: Path) -> float:
    """Between the adapters of two runs, over all stages and tensors."""
    from safetensors.torch import load_file

    largest = 0.0
    for file in sorted((one / "adapters").glob("*/adapter_model.safetensors")):
        mine, other = load_file(file), load_file(two / file.relative_to(one))
        assert mine.keys() == other.keys()
        largest = max(largest, *(float((mine[name] - other[name]).abs().max()) for name in mine))
    return largest
