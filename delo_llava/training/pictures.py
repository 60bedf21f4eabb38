"""The pictures of a run before its first step: whether each is there, and how many tokens it becomes.

What a picture becomes is told by its width and height, which its file's header says; in families that make
the same of every size no file is opened. Whether the rest of a file is sound `delo-llava data check` tells.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from delo_llava.data.collate import Layout, takes_all_room
from delo_llava.data.examples import Item, shown
from delo_llava.data.images import DUMMY_SIZE, BadImage, absent, size_by_header
from delo_llava.strict import IS_POINTER, is_pointer

if TYPE_CHECKING:
    from delo_llava.training.fit import Kit

#: By how many threads files are looked at: a network drive answers late, but many at a time.
THREADS = 16

#: Widths and heights; a family that makes the same of all of them makes it of every picture.
SIZES = (DUMMY_SIZE, (64, 64), (700, 300), (300, 1100), (1600, 1200))

Size = tuple[int, int]


class Pictures:
    """What is known of pictures, by their paths.

    Args:
        max_length: as `data.max_length`; a picture that fills it alone cannot be used.

    Attributes:
        unusable: path -> why it cannot be used.
    """

    def __init__(self, kit: "Kit", max_length: int) -> None:
        self._kit, self._max_length = kit, max_length
        self._of_size: dict[Size, Layout | str] = {}
        self._usable: dict[str, Layout] = {}
        self.unusable: dict[str, str] = {}
        self.dummy = kit.dummy_layout()
        self._alike = all(self._made(size) == self.dummy for size in SIZES)

    def look(self, paths: Sequence[str]) -> None:
        """Look at those that are not known yet, many at a time."""
        known = self._usable, self.unusable
        new = [path for path in dict.fromkeys(paths) if not any(path in found for found in known)]
        for path, found in zip(new, self._found(new), strict=True):
            made = found if isinstance(found, str) else self.dummy if found is None else self._made(found)
            if isinstance(made, str):
                self.unusable[path] = made
            else:
                self._usable[path] = made

    def layout(self, path: str) -> Layout:
        """What a usable picture's placeholder becomes."""
        return self._usable[path]

    def _found(self, paths: Sequence[str]) -> Iterator[Size | str | None]:
        """The size of each picture, None where it does not matter, or why it cannot be used."""
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(self._is_there if self._alike else _size, paths)

    @staticmethod
    def _is_there(path: str) -> str | None:
        if not os.path.isfile(path):
            return absent(Path(path))
        return IS_POINTER if is_pointer(Path(path)) else None

    def _made(self, size: Size) -> Layout | str:
        """What a picture of this size becomes, or why the model cannot take it."""
        if size not in self._of_size:
            backbone = self._kit.backbone
            try:
                made = backbone.encode_image(self._kit.processor, Image.new("RGB", size))
            except ValueError as error:
                self._of_size[size] = str(error)
            else:
                told = takes_all_room(made.tokens(backbone.image_token), self._max_length)
                self._of_size[size] = told or made.layout
        return self._of_size[size]


def picture_of(item: Item) -> str:
    """The path of the picture that an item shows; empty where it shows none."""
    return str(item[0].image) if shown(item)[0] else ""


def _size(path: str) -> Size | str:
    try:
        return size_by_header(Path(path))
    except BadImage as error:
        return str(error)
