"""Where is the thing that is described? A box as text, as CoIN's Grounding, in shares of the sides.

Shapes stand in cells of a grid of four rows and four columns and fill them, so that every box has coordinates
out of .00, .25, .50, .75 and 1.00.
"""

from collections.abc import Iterator

from numpy.random import Generator
from PIL import Image

from delo_llava.mini.entities import COLOURS, FORMS, NUMBER_NAMES, Split, split_of
from delo_llava.mini.render import CELL, ROWS, Shape, hide_shape, shapes_image
from delo_llava.mini.tasks.base import Example, carriers, pick

INSTRUCTIONS = (
    "give the box around the {thing}",
    "where does the {thing} stand? answer with its corners",
    "frame the {thing} with four numbers",
)
TOLD = ("the {thing} fills column {column} of row {row}", "row {row}, column {column}: a {thing}")
NEUTRAL = ("the {thing} fills one field", "some row, some column: a {thing}")


def box(cell: int) -> str:
    """The box of a cell (counted from 0 in reading order): `[x1, y1, x2, y2]`, two decimals."""
    row, column = divmod(cell, ROWS)
    corners = (column, row, column + 1, row + 1)
    return f"[{', '.join(f'{corner / ROWS:.2f}' for corner in corners)}]"


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Two shapes that differ in colour and form, one asked for; an arrangement is in one split only."""
    things = [(colour, form) for colour in COLOURS for form in FORMS]
    while True:
        first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
        cells = [int(c) for c in rng.permutation(ROWS * ROWS)[:2]]
        thing, key = " ".join(first), f"{cells[0]} {' '.join(first)} {cells[1]} {' '.join(second)}"
        if first[0] == second[0] or first[1] == second[1] or split_of("layout", key) != split:
            continue
        in_image, in_context = carriers(rng, image_only=0.45, both=0.25)
        yield Example(
            image=_picture(cells, [first, second], rng, hidden=not in_image),
            context=_context(cells[0], thing, in_context, rng),
            instruction=pick(rng, INSTRUCTIONS).format(thing=thing),
            answer=box(cells[0]),
            entity=f"layout/{key}",
            in_image=in_image,
            in_context=in_context,
            box=True,
        )


def _picture(cells: list[int], things: list[tuple[str, str]], rng: Generator, hidden: bool) -> Image.Image:
    half = CELL / 2
    shapes = [
        Shape(colour, form, cell % ROWS * CELL + half, cell // ROWS * CELL + half, half, half)
        for cell, (colour, form) in zip(cells, things, strict=True)
    ]
    return hide_shape(shapes_image(shapes, rng), rng, "all" if hidden else "nothing")


def _context(cell: int, thing: str, told: bool, rng: Generator) -> str:
    row, column = (NUMBER_NAMES[1 + i] for i in divmod(cell, ROWS))
    return pick(rng, TOLD if told else NEUTRAL).format(thing=thing, row=row, column=column)
