"""Images from disk: opened safely, faults told with file and record, a bounded memory of what was encoded."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from delo_llava.errors import DeloError
from delo_llava.tasks import Record

#: Larger pictures (in pixels) are refused before they are decoded: a small file can unpack to gigabytes.
MAX_PIXELS = 64 * 1024 * 1024

#: The dummy for a missing image: constant white (CMML protocol), of one size, as a missing image has none.
DUMMY_SIZE = (336, 336)


class BadImage(DeloError):
    """An image that cannot be used."""


class EncodedImage(NamedTuple):
    """One image as the model takes it: inputs (batched along dimension 0) and how many tokens it becomes."""

    inputs: dict[str, Tensor]
    tokens: int


def load_image(path: Path, record: Record) -> Image.Image:
    """The picture in `path` as RGB.

    Raises:
        DeloError: no such file, no image, damaged, or more than `MAX_PIXELS`; names file and record.
    """
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise image_error(
                    path, record, f"{picture.width}x{picture.height} is more than {MAX_PIXELS} pixels"
                )
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise image_error(path, record, "there is no such file") from error
    # Pillow reports damage by these four: unknown format or truncation, broken PNG chunks, bad values, bombs.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise image_error(path, record, str(error)) from error


def image_error(path: Path | None, record: Record, reason: str) -> BadImage:
    """The error for an image that cannot be used."""
    return BadImage(
        f"The image of record {record.id!r} ({record.task}/{record.split}) cannot be used: {reason}",
        given=path,
        fix="replace the file, remove the record, or train without such records: --data.on_bad_image=skip",
    )


def dummy_image() -> Image.Image:
    """Constant white."""
    return Image.new("RGB", DUMMY_SIZE, "white")


class ImageCache:
    """Least-recently-used memory of encoded images, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[Hashable, EncodedImage] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], EncodedImage]) -> EncodedImage:
        """The entry under `key`, made when it is not there; one larger than the whole cache is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = make()
        self._entries[key] = entry
        self.bytes += _bytes(entry)
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self._entries.popitem(last=False)[1])
        return entry


def _bytes(entry: EncodedImage) -> int:
    return sum(t.numel() * t.element_size() for t in entry.inputs.values())
