"""A checkpoint before anything of it is loaded: of what family it is, and whether its files are whole."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from delo_llava.errors import DeloError
from delo_llava.strict import is_pointer

#: Classes of the original LLaVA code, whose checkpoints transformers does not read.
ORIGINAL = re.compile(r"Llava\w*ForCausalLM")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
AGAIN = "fetch the checkpoint again, whole"
NOT_WHOLE = f"the checkpoint is not whole, or damaged: {AGAIN} (`hf download` fetches one from a hub)"
#: Files of which a tokenizer has at least one; without any, some families get an empty one, silently.
WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def read_config(path: str) -> dict[str, Any]:
    """A folder's or a hub repository's config.json, of which `model_type` is known.

    Raises:
        DeloError: it cannot be read, names no model_type, or is of the original LLaVA code.
    """
    from transformers import PreTrainedConfig

    refuse_pointers(path)
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, json.JSONDecodeError) as error:
        raise DeloError(
            "The model's config.json cannot be read.", given=path, fix=str(error).splitlines()[0]
        ) from error
    classes = [str(name) for name in config.get("architectures") or []]
    if "mm_vision_tower" in config or any(map(ORIGINAL.fullmatch, classes)):
        raise DeloError(
            "This is a checkpoint of the original LLaVA code, laid out otherwise than transformers reads it.",
            given=f"{path}: {', '.join(classes) or 'mm_vision_tower'}",
            fix="take the converted checkpoint, such as llava-hf/llava-1.5-7b-hf, or convert it with the "
            "convert_llava_weights_to_hf.py that comes with transformers",
        )
    if "model_type" not in config:
        raise DeloError("The model's config.json has no model_type.", given=path)
    return dict(config)


def require_tower(config: Mapping[str, Any], path: str) -> None:
    """Refuse a configuration that leaves the vision tower out.

    Raises:
        DeloError: transformers would build its default one, of another size.
    """
    if not config.get("vision_config"):
        raise DeloError(
            "The model's config.json does not describe its vision tower (vision_config).",
            given=path,
            fix="take the checkpoint's own config.json, as transformers saves it",
        )


def require_whole(path: str) -> None:
    """Look at the weights in a folder without reading them; those of a hub id are fetched when they are
    needed.

    Raises:
        DeloError: a file of them is absent, a pointer, cut off, or no safetensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    refuse_pointers(path)
    for name in _weights(folder):
        if not (folder / name).is_file():
            raise _unloadable(f"{name} is not there", path, AGAIN)
        try:
            with safe_open(str(folder / name), "pt"):
                pass
        except (OSError, SafetensorError) as error:
            fix = f"{name} is cut off or no safetensors: {AGAIN}"
            raise _unloadable(str(error), str(folder / name), fix) from error


def _weights(folder: Path) -> list[str]:
    """Names of the files with weights that transformers would look for."""
    if (folder / INDEX).is_file():
        try:
            return sorted(
                set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unloadable(f"{INDEX} is damaged", str(folder), AGAIN) from error
    if not (folder / SINGLE).is_file() and any(folder.glob("*.bin")):
        fix = "weights must be safetensors; others can be converted with transformers' save_pretrained"
        raise _unloadable("they are no safetensors", str(folder), fix)
    return [SINGLE]


def refuse_pointers(path: str) -> None:
    """Refuse a folder in which Git LFS has left pointers in place of files.

    Raises:
        DeloError: names them.
    """
    files = sorted(file for file in Path(path).glob("*") if file.is_file()) if Path(path).is_dir() else []
    found = [file.name for file in files if is_pointer(file)]
    if found:
        raise DeloError(
            "Files of this checkpoint are pointers of Git LFS, not the files themselves.",
            given=f"{path}: {', '.join(found)}",
            fix=f"git lfs pull, or {AGAIN}",
        )


@contextmanager
def told_if_absent(path: str, what: str, *more: type[Exception]) -> Iterator[None]:
    """Tell that a part of a checkpoint cannot be loaded, whatever the library says of it.

    Args:
        what: the part.
        more: what the library raises besides where a file is absent or damaged.

    Raises:
        DeloError: the block raised an error for a file that is absent or damaged.
    """
    kinds: tuple[type[Exception], ...] = (OSError, SafetensorError, *more)
    try:
        yield
    except kinds as error:
        told = str(error).strip().partition("\n")[0]
        raise DeloError(f"The model's {what} cannot be loaded: {told}", given=path, fix=NOT_WHOLE) from error


def require_words(path: str) -> None:
    """Refuse a checkpoint whose tokenizer was made without a vocabulary; of a hub id, once it was loaded.

    Raises:
        DeloError: none of `WORDS` is there.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path)
    found = [
        (folder / name).is_file() if folder.is_dir() else isinstance(try_to_load_from_cache(path, name), str)
        for name in WORDS
    ]
    if not any(found):
        told = f"The model's tokenizer cannot be loaded: there is none of {', '.join(WORDS)}"
        raise DeloError(told, given=path, fix=NOT_WHOLE)


def _unloadable(reason: str, given: str, fix: str) -> DeloError:
    return DeloError(f"The model's weights cannot be loaded: {reason}", given=given, fix=fix)
