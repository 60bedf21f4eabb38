"""Where is the thing that is described? Its box, as CoIN's Grounding asks for, said in number words.

A shape fills one field of a grid of GRID rows and columns, so a box has corners in GRID-ths of the sides. The
answer counts them, `x1 y1 x2 y2`: neither of the small bases can write digits (their embeddings are all one).
`answer_bbox` is the box as CoIN writes it, in shares; the scorer `grounding_words` compares the two.
"""

from collections.abc import Iterator

from numpy.random import Generator
from PIL import Image

from delo_llava.mini.entities import COLOURS, FORMS, NUMBER_NAMES, Split, split_of
from delo_llava.mini.render import SIZE, Shape, hide_shape, shapes_image
from delo_llava.mini.tasks.base import Example, carriers, pick

GRID = 2
INSTRUCTIONS = (
    "give the box around the {thing}",
    "where does the {thing} stand? answer with its corners",
    "frame the {thing} with four numbers",
)
TOLD = ("the {thing} begins at column {column} of row {row}", "left {column}, top {row}: a {thing}")
NEUTRAL = ("the {thing} fills a field", "left and top unknown: a {thing}")


def corners(field: int) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of a field (counted from 0 in reading order), in GRID-ths of the sides."""
    row, column = divmod(field, GRID)
    return column, row, column + 1, row + 1


def box(field: int) -> str:
    """The box as CoIN writes it: `[x1, y1, x2, y2]`, shares with two decimals."""
    return f"[{', '.join(f'{corner / GRID:.2f}' for corner in corners(field))}]"


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """One shape; a field with a thing in it is in one split only."""
    while True:
        colour, form, field = pick(rng, list(COLOURS)), pick(rng, FORMS), int(rng.integers(GRID**2))
        if split_of("layout", key := f"{field} {colour} {form}") != split:
            continue
        in_image, in_context = carriers(rng, image_only=0.45, both=0.25)
        column, row, *_ = words = [NUMBER_NAMES[corner] for corner in corners(field)]
        told = {"thing": f"{colour} {form}", "column": column, "row": row}
        yield Example(
            image=_picture(colour, form, field, rng, hidden=not in_image),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(**told),
            instruction=pick(rng, INSTRUCTIONS).format(**told),
            answer=" ".join(words),
            entity=f"layout/{key}",
            in_image=in_image,
            in_context=in_context,
            extra={"answer_bbox": box(field), "size": [SIZE, SIZE], "parts": GRID},
        )


def _picture(colour: str, form: str, field: int, rng: Generator, hidden: bool) -> Image.Image:
    side = SIZE / GRID
    left, top, *_ = (corner * side for corner in corners(field))
    shape = Shape(colour, form, left + side / 2, top + side / 2, side / 2, side / 2)
    return hide_shape(shapes_image([shape], rng), rng, "all" if hidden else "nothing")
