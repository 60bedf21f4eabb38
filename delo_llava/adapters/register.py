"""Make PEFT know a tuner of ours, so that `PeftModel.from_pretrained` opens its folders.

PEFT's own registration accepts only names in its enumeration; plain string keys in its three tables serve as
well.
"""

from typing import Any

from peft import PeftConfig, mapping

TABLES: Any = mapping


def register_tuner(name: str, config: type[PeftConfig], tuner: Any) -> None:
    """Enter a tuner under its `peft_type`.

    Args:
        tuner: a `BaseTuner` class with its `prefix`.
    """
    TABLES.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    TABLES.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    TABLES.PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix
