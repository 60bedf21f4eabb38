"""What differs between the base's families: configuration, tokenizer, prompt, how towers see, how parts join.

One file a family (`family_llava`, `family_qwen`); pictures, mixture, losses and loop are the same for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from delo_llava.backbones.base import Backbone
from delo_llava.errors import DeloError
from tools.mini_base.pretrain.talk import Talk

NAMES = ("llava", "qwen")
WIDTH, LAYERS, HEADS, INTERMEDIATE = 128, 4, 4, 384
"""Of the language model; all widths are multiples of 64 for 4-bit blocks."""
TOKENS = 16
"""Image tokens of a picture, one for each cell of 16 pixels."""


def pixel_values(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, 64, 64, 3] to the processors' normalised float32 [B, 3, 64, 64] (mean and std one half)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class Tongue(ABC):
    """A trained tokenizer, and how talks and drills are written with it.

    Attributes:
        image: the text of one image token.
        space, newline: how a vocabulary writes the space before a word, and the piece of a line's end.
    """

    image: ClassVar[str]
    space: ClassVar[str]
    newline: ClassVar[str]
    backbone: Backbone

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def image_id(self) -> int:
        """Id of the image token."""
        return self.vocabulary[self.image]

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """Ids of texts that are one piece each; a leading space belongs to the piece."""
        marked = (t.replace("\n", self.newline).replace(" ", self.space) for t in texts)
        return [self.vocabulary[t] for t in marked]

    def words(self, words: Iterable[str]) -> NDArray[np.int64]:
        """Ids of those words that are one piece after a space."""
        marked = (f"{self.space}{word}" for word in words)
        return np.array([self.vocabulary[w] for w in marked if w in self.vocabulary])

    @property
    @abstractmethod
    def opening(self) -> list[int]:
        """Ids that a text begins with."""

    @property
    @abstractmethod
    def plain(self) -> tuple[int, int]:
        """First and last + 1 of the ids of ordinary pieces."""

    @property
    @abstractmethod
    def links(self) -> list[tuple[list[int], bool]]:
        """What may stand between a question and its answer in a drill, and whether the answer begins a text
        there (see `begun`).
        """

    def begun(self, piece: int) -> int:
        """The piece that says at the beginning of an answer what `piece` says after a space."""
        return piece

    def prompt(self, talk: Talk, turn: int, picture: bool) -> str:
        """One turn up to its answer, worded as in training and evaluation."""
        context = talk.context if turn == 0 else None
        image = self.backbone.image_token if picture else None
        pieces = self.backbone.default_dialogue.prompt(image, context or None, talk.turns[turn][0])
        return "".join(text for text, _ in pieces)

    def render(self, talk: Talk, picture: bool) -> tuple[str, list[tuple[int, int]]]:
        """The talk as one string, its image tokens written out, and the character spans of its answers (each
        with what closes it).
        """
        text, spans = "", []
        for turn, (_, answer) in enumerate(talk.turns):
            prompt = self.prompt(talk, turn, picture and turn == 0)
            text += prompt.replace(self.image, self.image * TOKENS)
            said = self.backbone.default_dialogue.answer(answer)
            spans.append((len(text), len(text) + len(said)))
            text += said
        return text, spans


class Family(ABC):
    """A model family as pretraining sees it; stateless, one instance (`FAMILY` of its module).

    Attributes:
        folder: name of the finished base's folder.
        seen_width: width of what the tower's heads read and the projector's first linear gets.
    """

    folder: ClassVar[str]
    seen_width: ClassVar[int]

    @abstractmethod
    def train_tokenizer(self, lines: Iterable[str], size: int, folder: Path) -> None:
        """Learn a vocabulary of about `size` pieces and write it into `folder`."""

    @abstractmethod
    def load_tokenizer(self, folder: Path) -> Tongue:
        """The tokenizer of `folder`, padding on the right."""

    @abstractmethod
    def new_language(self, tongue: Tongue) -> Any:
        """A random causal language model with `.model` and `.lm_head`."""

    def start_from_llava(self, language: Any, tongue: Tongue, folder: Path) -> None:
        """Begin the language model with the layers of a finished mini-llava in `folder`, in place.

        Raises:
            DeloError: a family that cannot.
        """
        raise DeloError("This family's language model starts at random only.", given=self.folder)

    @abstractmethod
    def new_vision(self) -> nn.Module:
        """A random vision model."""

    @abstractmethod
    def see(self, vision: nn.Module, pixels: NDArray[np.uint8]) -> Tensor:
        """What the projector reads of uint8 [B, 64, 64, 3]: [B, 16, seen_width], in reading order."""

    @abstractmethod
    def join(self, vision: nn.Module, language: Any, tongue: Tongue) -> Any:
        """The whole stock model with both parts' weights and a random projector; the tower is frozen."""

    @abstractmethod
    def projector(self, model: Any) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        """The projector's first linear, activation and second linear."""

    def positions(self, images: Tensor) -> Tensor | None:
        """Position ids [3, B, L] that follow from where image tokens are ([B, L] bool), if the model wants
        them.
        """
        return None

    @abstractmethod
    def save(self, model: Any, tongue: Tongue, words: Path, folder: Path) -> None:
        """Write model, tokenizer (trained in `words`) and processor as a stock folder."""


def find(name: str) -> Family:
    """The family of that name."""
    family: Family = import_module(f"tools.mini_base.pretrain.family_{name}").FAMILY
    return family
