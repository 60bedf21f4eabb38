"""What an answer depends on, as a key: answers of equal keys are equal, so a stored one may be reused."""

from pathlib import Path
from typing import Any

from delo_eval.answers.hashes import FileHashes, digest, package_versions
from delo_eval.answers.question import Question
from delo_llava.config import RunConfig
from delo_llava.files import sha256_file
from delo_llava.runs.manifest import MANIFEST

#: Files of a base that decide an answer: weights, configuration, tokenizer, processor.
BASE_FILES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}

_SHORT = 16


class AnswerKeys:
    """Keys of the questions to one model, the one after a stage.

    Attributes:
        context: first letters of every key: the model, the settings and the code. Presence flags, texts and
            the image's content make up the rest.
    """

    def __init__(self, facts: dict[str, Any], hashes: FileHashes) -> None:
        self.context = digest(facts)[:_SHORT] + "-"
        self._hashes = hashes

    def of(self, question: Question, max_new_tokens: int) -> str:
        """The key of one question; what the model may not see, and the reference answer, do not count."""
        record, (image, text) = question.record, question.presence
        shown = [
            max_new_tokens, record.task, record.id, record.instruction, record.context if text else None,
            image, text, record.image is not None and image and (self._hashes.of(record.image) or "no file"),
        ]  # fmt: skip
        return self.context + digest(shown)[: 2 * _SHORT]


def model_facts(
    config: RunConfig,
    model_path: str,
    adapters: dict[str, Path],
    device: str,
    code: str,
    hashes: FileHashes,
) -> dict[str, Any]:
    """Everything but the question that an answer depends on, for one stage.

    Args:
        adapters: task -> published folder, proven to be what its manifest says.
        device: kind of device, `cpu` or `cuda`.
        code: hash of the source that decides answers.
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
        "limits": config.data.limits.given(),
        "missing_image": config.missing.image,
        "code": code,
        "versions": package_versions(),
    }


def base_identity(model_path: str, hashes: FileHashes) -> str:
    """One hash over a folder's files, or the commit of a model from the hub, which names its content."""
    folder = Path(model_path)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in BASE_FILES)
        return digest([[file.name, hashes.of(file)] for file in files])
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model_path, "config.json")
    return f"{model_path}@{Path(config).parent.name if isinstance(config, str) else None}"
