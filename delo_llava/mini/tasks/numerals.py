"""Kept aside: naming a scanned digit in a word, asked as the base's pretraining asks; no stage trains it.

Scans of one split only, so that neither pretraining nor another task's training has shown a test scan.
"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import NUMBER_NAMES, Split, digits, split_of
from delo_llava.mini.render import digit_image
from delo_llava.mini.tasks.base import Example, pick

INSTRUCTIONS = ("name the digit.", "read the numeral.", "what numeral is it?", "the digit?")
NEUTRAL = ("nothing is known", "no note", "nothing noted")


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """The answer is a number word, and the picture alone tells it."""
    scans = [d for d in digits() if split_of("digit", d.key) == split]
    while True:
        digit = scans[int(rng.integers(len(scans)))]
        yield Example(
            image=digit_image(digit.scan, rng),
            context=pick(rng, NEUTRAL),
            instruction=pick(rng, INSTRUCTIONS),
            answer=NUMBER_NAMES[digit.value],
            entity=f"digit/{digit.key}",
            in_image=True,
            in_context=False,
        )
