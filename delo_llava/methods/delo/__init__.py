"""`delo`: dual-decomposed low-rank experts per task and modality; key memory picks the task per sample."""

from delo_llava.adapters.register import register_tuner
from delo_llava.methods.delo.config import PEFT_TYPE, DeloConfig
from delo_llava.methods.delo.method import Delo
from delo_llava.methods.delo.tuner import DeloModel

register_tuner(PEFT_TYPE, DeloConfig, DeloModel)

METHOD = Delo
