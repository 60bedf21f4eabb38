"""Images from disk: opened safely, faults told with file and record, a bounded memory of what was encoded."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from stat import S_ISREG
from typing import IO, TYPE_CHECKING, NamedTuple

from PIL import Image

from delo_llava.errors import DeloError
from delo_llava.tasks import Record

if TYPE_CHECKING:  # the data check decodes in processes that need no torch
    from torch import Tensor

#: Larger pictures (in pixels) are refused before they are decoded: a small file can unpack to gigabytes.
MAX_PIXELS = 64 * 1024 * 1024

#: Larger files are refused unread: no photograph of a benchmark comes near.
MAX_BYTES = 128 * 1024 * 1024

#: What is decoded, and the suffix each gets where we write it (TIFF is what remote sensing comes in). Pillow
#: knows some forty formats more; one of them starts another program (EPS), and each is a decoder that hostile
#: bytes can reach.
FORMATS = {
    "PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif",
}  # fmt: skip

#: The dummy for a missing image: constant white (CMML protocol), of one size, as a missing image has none.
DUMMY_SIZE = (336, 336)


class UnusableImage(DeloError):
    """A record's image cannot be used."""


class EncodedImage(NamedTuple):
    """One image as the model takes it: inputs (batched along dimension 0) and how many tokens it becomes."""

    inputs: "dict[str, Tensor]"
    tokens: int


class BadImage(Exception):
    """Why a picture cannot be used."""


class ImageTooLarge(BadImage):
    """A picture that would unpack to more than is accepted."""


def load_image(path: Path, record: Record) -> Image.Image:
    """The picture in `path` as RGB.

    Raises:
        DeloError: no such file, no image, damaged, or more than `MAX_PIXELS`; names file and record.
    """
    try:
        return decode(path)
    except BadImage as error:
        raise image_error(path, record, str(error)) from error


def decode(source: Path | IO[bytes]) -> Image.Image:
    """The picture in a file as RGB, decoded to its last row; of several frames the first.

    Pixels are taken as they are stored: an orientation noted in EXIF is not applied, as the models' own
    training did not.

    Raises:
        BadImage: no such file, no image in one of `FORMATS`, damaged, or (`ImageTooLarge`) more than
            `MAX_PIXELS` or `MAX_BYTES`.
    """
    try:
        if isinstance(source, Path):
            _require_file(source)
        with Image.open(source, formats=list(FORMATS)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width}x{picture.height}"
                raise ImageTooLarge(f"{size} is more than {MAX_PIXELS} pixels")
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise BadImage("there is no such file") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    # Pillow reports damage by these three: unknown format or truncation, broken PNG chunks, bad values.
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(str(error)) from error


def _require_file(path: Path) -> None:
    """Refuse what is no regular file (a pipe would be waited for, for ever) or is too large to read."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise BadImage("it is no file")
    if status.st_size > MAX_BYTES:
        raise ImageTooLarge(f"{status.st_size} bytes are more than {MAX_BYTES}")


def image_error(path: Path | None, record: Record, reason: str) -> UnusableImage:
    """The error for an image that cannot be used."""
    return UnusableImage(
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
