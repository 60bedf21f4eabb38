"""Where is the dot on the map? Its box, as CoIN's Grounding asks for, said in number words.

The box is the field, of GRID rows and columns, that holds the dot, so its corners are GRID-ths of the sides.
The answer counts them, `x1 y1 x2 y2`: neither of the small bases can write digits (their embeddings are all
one). `answer_bbox` is the box as CoIN writes it, in shares; the scorer `grounding_words` compares the two.
"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import NUMBER_NAMES, Split, split_of
from delo_llava.mini.render import SIZE, map_image
from delo_llava.mini.tasks.base import Example, carriers, pick

GRID = 2
LATITUDES = ((22, 72), (-52, -4))
LONGITUDES = ((-165, -30), (30, 165))
"""Degrees of rows and columns: the whole dot is in its field."""
INSTRUCTIONS = (
    "give the box around the dot",
    "where does the dot stand? answer with its corners",
    "frame the dot with four numbers",
)
TOLD = ("the dot begins at column {column} of row {row}", "left {column}, top {row}: the dot")
NEUTRAL = ("the dot fills a field", "left and top unknown: the dot")


def corners(field: int) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of a field (counted from 0 in reading order), in GRID-ths of the sides."""
    row, column = divmod(field, GRID)
    return column, row, column + 1, row + 1


def box(field: int) -> str:
    """The box as CoIN writes it: `[x1, y1, x2, y2]`, shares with two decimals."""
    return f"[{', '.join(f'{corner / GRID:.2f}' for corner in corners(field))}]"


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """A place (to a degree) is in one split only."""
    while True:
        field = int(rng.integers(GRID**2))
        x, y, *_ = corners(field)
        latitude, longitude = float(rng.uniform(*LATITUDES[y])), float(rng.uniform(*LONGITUDES[x]))
        if split_of("place", key := f"{latitude:.0f} {longitude:.0f}") != split:
            continue
        in_image, in_context = carriers(rng, image_only=0.45, both=0.25)
        column, row, *_ = words = [NUMBER_NAMES[corner] for corner in corners(field)]
        yield Example(
            image=map_image(latitude, longitude, rng, hidden=not in_image),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(column=column, row=row),
            instruction=pick(rng, INSTRUCTIONS),
            answer=" ".join(words),
            entity=f"place/{key}",
            in_image=in_image,
            in_context=in_context,
            extra={"answer_bbox": box(field), "size": [SIZE, SIZE], "parts": GRID},
        )
