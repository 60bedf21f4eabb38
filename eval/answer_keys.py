"""What an answer depends on, as a key: answers of equal keys are equal, so a stored one may be reused."""

import hashlib
import json
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from delo_eval.answers import FOLDER, told_writing
from delo_eval.generate import Question
from delo_llava.backbones.base import Backbone
from delo_llava.checkpoint.manifest import MANIFEST, HashCache, combined_hash, sha256_file
from delo_llava.config import RunConfig
from delo_llava.methods.base import Method

#: Modules and packages whose code decides an answer.
CODE = (
    "delo_eval.generate",
    "delo_llava.backbones",
    "delo_llava.data.collate",
    "delo_llava.data.images",
    "delo_llava.experts",
    "delo_llava.methods",
    "delo_llava.routing",
)
#: Packages whose version may decide an answer.
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "flash-attn", "numpy", "pillow",
    "torchvision",
)  # fmt: skip
#: Files of a base that decide an answer: weights, configuration, tokenizer, processor.
BASE_FILES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}

_SHORT = 16


class FileHashes:
    """sha256 of images and of the base's files, remembered by size and time in the folder of the answers.

    Several ranks each write a memory of their own; the first takes in the others' at the end.
    """

    def __init__(self, output: Path, rank: int = 0) -> None:
        self._folder = output / FOLDER
        shared = _memory(self._folder / "hashes.json")
        self.cache = shared if rank == 0 else _memory(self._folder / f".hashes.part{rank}")
        self._saved = dict(self.cache.known)
        self.cache.known = {**shared.known, **self.cache.known}
        self._seen: dict[Path, str | None] = {}

    def of(self, path: Path) -> str | None:
        """The hash, or None where there is no such file; each file is looked at once."""
        if path not in self._seen:
            self._seen[path] = self.cache.hash(path) if path.is_file() else None
        return self._seen[path]

    def take_parts(self) -> None:
        """Learn what the other ranks hashed (first rank, when they are done)."""
        for part in self._folder.glob(".hashes.part*"):
            self.cache.known.update(_memory(part).known)
            part.unlink()

    def save(self) -> None:
        """Write the memory back, if it changed.

        Raises:
            DeloError: the disk is full, or the folder cannot be written.
        """
        if self._saved != self.cache.known:
            with told_writing(self._folder):
                self.cache.save()
            self._saved = dict(self.cache.known)


def _memory(path: Path) -> HashCache:
    """The memory in a file; a damaged one holds nothing that could not be found out again."""
    try:
        return HashCache(path)
    except ValueError:
        path.unlink()
        return HashCache(path)


class AnswerKeys:
    """Keys of the questions to one model, the one after a stage.

    Attributes:
        context: first letters of every key: the model, the settings and the code. Presence flags, texts and
            the image's content make up the rest.
    """

    def __init__(self, facts: dict[str, Any], hashes: FileHashes) -> None:
        self.context = _digest(facts)[:_SHORT] + "-"
        self._hashes = hashes

    def of(self, question: Question, max_new_tokens: int) -> str:
        """The key of one question; what the model may not see, and the reference answer, are no part of it."""
        record, (image, text) = question.record, question.presence
        shown = [
            max_new_tokens, record.task, record.id, record.instruction, record.context if text else None,
            image, text, record.image is not None and image and (self._hashes.of(record.image) or "no file"),
        ]  # fmt: skip
        return self.context + _digest(shown)[: 2 * _SHORT]


def model_facts(
    config: RunConfig,
    method: Method,
    backbone: Backbone,
    model_path: str,
    adapters: dict[str, Path],
    device: str,
    hashes: FileHashes,
) -> dict[str, Any]:
    """Everything but the question that an answer depends on, for one stage.

    Args:
        adapters: task -> published folder, proven to be what its manifest says.
        device: kind of device, `cpu` or `cuda`.
    """
    return {
        "base": base_identity(model_path, hashes),
        "adapters": [[task, sha256_file(folder / MANIFEST)] for task, folder in adapters.items()],
        "method": config.method,
        "options": config.methods,
        "quant": config.quant,
        "dtype": config.dtype,
        "attn": config.attn,
        "device": device,
        "beams": config.eval.num_beams,
        "oracle": config.eval.oracle,
        "max_length": config.data.max_length,
        "missing_image": config.missing.image,
        "code": code_hash((*CODE, type(method).__module__, type(backbone).__module__)),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def base_identity(model_path: str, hashes: FileHashes) -> str:
    """One hash over a folder's files, or the commit of a model from the hub, which names its content."""
    folder = Path(model_path)
    if folder.is_dir():
        files = (file for file in folder.iterdir() if file.is_file() and file.suffix in BASE_FILES)
        return combined_hash(hashes.cache, files)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model_path, "config.json")
    return f"{model_path}@{Path(config).parent.name if isinstance(config, str) else None}"


@cache
def code_hash(modules: tuple[str, ...]) -> str:
    """One hash over the source of modules and packages (with all they hold)."""
    files: list[Path] = []
    for name in dict.fromkeys(modules):
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None and loaded.__spec__ is not None else find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        files += sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    return hashlib.sha256("\n".join(sha256_file(file) for file in files).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
