"""`delo`: dual-decomposed low-rank experts per task and modality; key memory picks the task per sample."""

from delo_llava.adapters.register import register_tuner
from delo_llava.methods.delo.config import DeloConfig, DeloType
from delo_llava.methods.delo.method import Delo
from delo_llava.methods.delo.tuner import DeloModel

register_tuner(DeloType.DELO, DeloConfig, DeloModel)

METHOD = Delo
