"""LLaVA-NeXT, also called LLaVA-1.6 (`llava_next`): one to four tiles beside the whole picture."""

from delo_llava.backbones._anyres import AnyRes
from delo_llava.backbones.llava import Llava


class LlavaNext(AnyRes):
    """Mistral, Vicuna and Yi write turns differently; the checkpoint's template says how."""

    model_types = ("llava_next",)
    default_dialogue = Llava.default_dialogue


BACKBONE = LlavaNext()
