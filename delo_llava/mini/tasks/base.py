"""What the tasks share: an example, and the draw of which modality carries its answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from numpy.random import Generator
from PIL import Image

from delo_llava.mini.entities import Split


@dataclass(frozen=True)
class Example:
    """One example before it is written.

    Attributes:
        image: None where a record has no picture.
        in_image, in_context: who carries the answer; neither only where the answer says that none does.
        extra: further keys of the record, for scorers.
    """

    image: Image.Image | None
    context: str
    instruction: str
    answer: str
    entity: str
    in_image: bool
    in_context: bool
    extra: Mapping[str, object] = field(default_factory=dict)


class Records(Protocol):
    """A task's generator: endless, and a pure function of the split and the state of `rng`."""

    def __call__(self, split: Split, rng: Generator) -> Iterator[Example]:
        """Examples of one split."""
        ...


def carriers(rng: Generator, image_only: float, both: float) -> tuple[bool, bool]:
    """Draw (in_image, in_context): image only, both, or else context only."""
    draw = rng.random()
    return draw < image_only + both, draw >= image_only


def pick(rng: Generator, items: tuple[str, ...] | list[str]) -> str:
    """One of the items, each as likely as the others."""
    return items[int(rng.integers(len(items)))]
