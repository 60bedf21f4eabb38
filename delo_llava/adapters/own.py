"""Whether an adapter's folder holds what this project writes, before PEFT reads it.

PEFT would unpickle `adapter_model.bin`, fetch what is missing from a hub, and act on fields of the
configuration that load tokenizers or import modules.
"""

from collections.abc import Collection
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from delo_llava.errors import DeloError
from delo_llava.strict import read_json

#: The tensors of an adapter, under PEFT's name.
TENSORS = "adapter_model.safetensors"

#: Fields of PEFT's own that differ between our adapters, or that PEFT notes and does not act on here.
VARYING = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "peft_version",
    "r", "target_modules",
}  # fmt: skip


def require_own_adapter(folder: Path, kind: type[PeftConfig], fields: Collection[str] = ()) -> Path:
    """`folder`, if PEFT can be let at it.

    Args:
        kind: the configuration that the method writes.
        fields: of PEFT's own kind, those that the method sets besides the usual ones.

    Raises:
        DeloError: the tensors are missing or no safetensors, or the configuration is of another kind or sets
            a field that this project leaves alone.
    """
    fix = "train the stage again, or put back what the run published"
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise DeloError(
            f"The adapter's tensors cannot be read: {error}", given=folder / TENSORS, fix=fix
        ) from error
    path = folder / "adapter_config.json"
    given = read_json(path, "The adapter's configuration", fix)
    usual = kind().to_dict()
    expected = getattr(usual["peft_type"], "value", usual["peft_type"])
    if given.get("peft_type") != expected:
        raise DeloError("This is another kind of adapter.", given=given.get("peft_type"), allowed=[expected])
    # Of PEFT's own kinds we set the fields in VARYING only; another kind's fields are its method's.
    ours = (base for base in kind.__mro__ if not base.__module__.startswith(("peft.", "builtins")))
    own = {field for base in ours for field in vars(base).get("__annotations__", {})}
    for name, value in given.items():
        if name not in VARYING | own | {"peft_type", *fields} and value and value != usual.get(name):
            raise DeloError(
                f"The adapter's configuration sets `{name}`, which this project never does.",
                given=f"{path}: {value!r:.80}",
                fix=fix,
            )
    return folder
