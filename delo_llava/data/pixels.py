"""A picture as a person sees it: the one conversion to RGB, whatever a file stores.

| stored | becomes | as |
|---|---|---|
| 1 to 8 bits of grey, a palette, RGB, YCbCr, CMYK, Lab | RGB | Pillow converts |
| alpha, transparent entries of a palette, a transparent colour | put on white | Qwen and vLLM do [1] |
| 9 to 16 bits of grey | the upper 8 bits | Pillow does with 16-bit colours [2] |
| floating point | 0 is black, 1 is white | scientific libraries do |
| an EXIF orientation | upright | `datasets` and Transformers do [3] |
| several frames | the first | all do |

[1] LLaVA's own loader drops alpha, which bares what is hidden: a black drawing on transparent ground becomes
black on black. [2] The type's largest value is white; Pillow clips grey instead, which leaves two levels.
[3] LLaVA's does not.

Refused, as nobody can tell which value is white: signed and 32-bit integers, floating point beyond 0 to 1,
and a transparent colour in a picture without 8 bits. Colour profiles are not applied, as in those loaders.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ORIENTATION = 0x0112

#: EXIF orientation -> what makes the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Those of them that exchange width and height.
_ASIDE = (5, 6, 7, 8)

#: TIFF's tags, and the values that matter here.
_BITS, _PHOTOMETRIC, _SAMPLES = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2

#: How pixels lie in a PNG whose transparent colour Pillow compares rightly.
_PLAIN = ("1", "L", "RGB", "P")


def as_seen(picture: Image.Image) -> Image.Image:
    """The picture in an opened file, decoded to its last row: RGB, as a person sees it.

    Raises:
        ValueError: it cannot be shown faithfully; also what Pillow raises for damaged files.
    """
    _require_plain_key(picture)
    picture.load()
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        shown = _from_grey(picture)
    elif _SIGNED in _tag(picture, _SAMPLES):
        raise ValueError("its pixels are signed numbers, of which none is known to be white")
    elif picture.has_transparency_data:
        shown = Image.new("RGB", picture.size, "white")
        seen = picture.convert("RGBA")
        shown.paste(seen, mask=seen.getchannel("A"))
    else:
        shown = picture.convert("RGB")
    turn = _UPRIGHT.get(_orientation(picture))
    return shown if turn is None else shown.transpose(turn)


def size_as_seen(picture: Image.Image) -> tuple[int, int]:
    """Width and height that `as_seen` gives, by the header of an opened file."""
    # Of TIFF Pillow gives the upright size; a whole PNG is decoded to look for EXIF that its header lacks.
    asked = picture.format != "TIFF" and (picture.format != "PNG" or "exif" in picture.info)
    turned = asked and _orientation(picture) in _ASIDE
    return (picture.height, picture.width) if turned else picture.size


def _from_grey(picture: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits."""
    values = np.asarray(picture)
    if picture.mode == "F":
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("its pixels are floating point beyond 0 to 1: store them with 8 or 16 bits")
        grey = np.rint(values * 255).astype(np.uint8)
    elif picture.mode == "I":
        raise ValueError("its pixels are 32-bit or signed numbers: store them with 8 or 16 bits")
    else:
        bits = next(iter(_tag(picture, _BITS)), 16)
        grey = (values >> (bits - 8)).astype(np.uint8)
    if _WHITE_IS_ZERO in _tag(picture, _PHOTOMETRIC):
        grey = 255 - grey
    return Image.fromarray(_three(grey))


def _three(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _require_plain_key(picture: Image.Image) -> None:
    """Refuse a transparent colour that is written with other bits than the pixels are decoded to."""
    tiles: list[Any] = getattr(picture, "tile", [])
    if picture.format == "PNG" and tiles and "transparency" in picture.info:
        stored = str(tiles[0][3])
        if not stored.startswith("P") and stored not in _PLAIN:
            raise ValueError(f"it has a transparent colour and is stored as {stored}: store it with alpha")


def _tag(picture: Image.Image, tag: int) -> tuple[int, ...]:
    """The values of a tag of a TIFF; none in other formats."""
    found: Any = getattr(picture, "tag_v2", {}).get(tag, ())
    return found if isinstance(found, tuple) else (found,)


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation; upright where EXIF is damaged or says nothing. (Pillow turns TIFF by itself.)"""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, TypeError, ValueError):
        return 1
