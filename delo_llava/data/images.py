"""Images from disk: opened safely, faults told with file and record, a bounded memory of what was encoded."""

import struct
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from delo_llava.data.pixels import as_seen, size_as_seen
from delo_llava.errors import DeloError
from delo_llava.strict import FETCH, IS_POINTER, POINTER
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


@dataclass(frozen=True)
class ImageLimits:
    """How large a picture is shown, where its family leaves the choice; None keeps the checkpoint's setting.

    Attributes:
        min_pixels, max_pixels: a picture is resized to lie between them.
        max_tiles: into which it is cut at most, beside the whole picture.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None

    def given(self) -> dict[str, int]:
        """Those that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class EncodedImage:
    """One picture as the model takes it.

    Attributes:
        inputs: model inputs; those of several pictures are joined along dimension 0.
        layout: what its placeholder in a prompt becomes: (text, copies), of which those whose text is the
            family's image token are image tokens. It begins and ends with special tokens, so that its
            neighbours cannot merge with it.
        units: its entries along dimension 0 of the projector's output (pictures, tiles, or merged patches).
        kept: bool, which of the projector's outputs (units in order) the language model sees; None: all. A
            family gives it for every picture or for none.
    """

    inputs: "dict[str, Tensor]"
    layout: tuple[tuple[str, int], ...]
    units: int
    kept: "Tensor | None" = None

    def tokens(self, image_token: str) -> int:
        """How many image tokens it becomes."""
        return sum(copies for text, copies in self.layout if text == image_token)


class BadImage(Exception):
    """Why a picture cannot be used."""


class ImageTooLarge(BadImage):
    """A picture that would unpack to more than is accepted."""


def load_image(path: Path, record: Record) -> Image.Image:
    """The picture in `path` as RGB, as a person sees it (`decode`).

    Raises:
        DeloError: no such file, no image, damaged, or more than `MAX_PIXELS`; names file and record.
    """
    try:
        return decode(path)
    except BadImage as error:
        raise image_error(path, record, str(error)) from error


def decode(source: Path | IO[bytes]) -> Image.Image:
    """The picture in a file as RGB, decoded to its last row, as a person sees it: see `pixels.py`.

    Raises:
        BadImage: no such file, no image in one of `FORMATS`, damaged, one that cannot be shown faithfully, or
            (`ImageTooLarge`) more than `MAX_PIXELS` or `MAX_BYTES`.
    """
    with _opened(source) as picture:
        return as_seen(picture)


def size_by_header(path: Path) -> tuple[int, int]:
    """Width and height of the picture in a file as `decode` gives it, without its pixels.

    Raises:
        BadImage: see `decode`, as far as the file's beginning tells.
    """
    with _opened(path) as picture:
        return size_as_seen(picture)


@contextmanager
def _opened(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """The picture in a file, of which only the header is read yet; what Pillow raises becomes `BadImage`."""
    try:
        if isinstance(source, Path):
            _require_file(source)
        with Image.open(source, formats=list(FORMATS)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width}x{picture.height}"
                raise ImageTooLarge(f"{size} is more than {MAX_PIXELS} pixels")
            yield picture
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    except UnidentifiedImageError as error:
        if _begins(source, POINTER):
            raise BadImage(f"{IS_POINTER} ({FETCH})") from error
        raise BadImage(f"it is no image in one of the formats {', '.join(FORMATS)}") from error
    # Pillow reports damage by these: truncation, broken PNG chunks, bad values, tags that do not fit.
    except (OSError, SyntaxError, ValueError, struct.error, TypeError) as error:
        raise BadImage(str(error)) from error


def _begins(source: Path | IO[bytes], start: bytes) -> bool:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _begins(file, start)
    source.seek(0)
    return source.read(len(start)) == start


def absent(path: Path) -> str:
    """That a file is not there, and what is there by nearly the same name."""
    told = "there is no such file"
    if "\\" in str(path):
        other = Path(str(path).replace("\\", "/"))
        return f"{told}, but {other} is there" if other.is_file() else f"{told}; folders are parted by /"
    name = _names_in(path.parent).get(_plain(path.name))
    if name is None:
        return told
    composed = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", path.name)
    return f"{told}, but {name} is there" + (", whose letters are composed otherwise" if composed else "")


@lru_cache(maxsize=16)  # many files of one folder may be missing
def _names_in(folder: Path) -> dict[str, str]:
    """The names in a folder by what they have in common with others of their kind."""
    with suppress(OSError):  # no such folder, or no right to list it
        return {_plain(path.name): path.name for path in folder.iterdir()}
    return {}


def _plain(name: str) -> str:
    """A name without capitals, signs for spaces, and what tells ways to compose letters apart."""
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def _require_file(path: Path) -> None:
    """Refuse what is no regular file (a pipe would be waited for, for ever) or is too large to read."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise BadImage(absent(path)) from error
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
