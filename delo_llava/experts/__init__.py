"""DeLo experts as a PEFT tuner. Importing this package registers the type "DELO", so
`PeftModel.from_pretrained` opens its folders.

PEFT's own registration accepts only names in its enumeration; plain string keys in its three tables serve as
well.
"""

from typing import Any

from peft import mapping

from delo_llava.experts.config import PEFT_TYPE, DeloConfig, trainable_parameter_count
from delo_llava.experts.layer import DeloLayer
from delo_llava.experts.model import (
    DeloModel,
    checkpoint_context_fn,
    frozen_queries,
    routing,
    set_trainable,
    tuner,
)
from delo_llava.experts.store import load_adapters, save_adapter

TABLES: Any = mapping
TABLES.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DeloConfig
TABLES.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DeloModel
TABLES.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DeloModel.prefix

__all__ = [
    "DeloConfig",
    "DeloLayer",
    "DeloModel",
    "checkpoint_context_fn",
    "frozen_queries",
    "load_adapters",
    "routing",
    "save_adapter",
    "set_trainable",
    "trainable_parameter_count",
    "tuner",
]
