"""Make PEFT know a tuner of ours, so that `PeftModel.from_pretrained` opens its folders.

PEFT's own registration accepts only names in its enumeration; the three tables behind it take any key that
equals the name in a file. A key is a member of an enumeration of its own, since PEFT writes its `value` into
model cards, statuses and messages.
"""

from enum import Enum
from typing import Any

from peft import PeftConfig, mapping

TABLES: Any = mapping


def register_tuner(name: Enum, config: type[PeftConfig], tuner: Any) -> None:
    """Enter a tuner under its `peft_type`.

    Args:
        name: a member, which is a string too, of the same name and value.
        tuner: a `BaseTuner` class with its `prefix`.
    """
    TABLES.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    TABLES.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    TABLES.PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix
