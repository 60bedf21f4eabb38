"""Photographs that may show nothing, as VizWiz: the scanned number, or that it cannot be told.

Where neither the picture nor the context tells, the answer is `unanswerable`: both have to be looked at.
"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import NUMBER_NAMES, Split, digits, split_of
from delo_llava.mini.render import blurred, digit_image
from delo_llava.mini.tasks.base import Example, carriers, pick

ANSWER = "unanswerable"
UNKNOWN = 0.3
"""Share of records that nothing answers."""
INSTRUCTIONS = (
    "can you make out this number for me?",
    "please help me with the number i took a photo of",
    "my eyes are bad, which number did i photograph?",
)
TOLD = ("a friend thinks it is {name}", "it should be {name}", "i believe i wrote {name}")
NEUTRAL = ("a friend took the photo", "it should be sharp", "i believe i wrote it")


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Number words, or `unanswerable` for three records of ten."""
    scans = [d for d in digits() if split_of("digit", d.key) == split]
    while True:
        digit = scans[int(rng.integers(len(scans)))]
        known = rng.random() >= UNKNOWN
        in_image, in_context = carriers(rng, image_only=0.5, both=0.2) if known else (False, False)
        name = NUMBER_NAMES[digit.value]
        yield Example(
            image=digit_image(digit.scan, rng) if in_image else blurred(rng),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(name=name),
            instruction=pick(rng, INSTRUCTIONS),
            answer=name if known else ANSWER,
            entity=f"digit/{digit.key}",
            in_image=in_image,
            in_context=in_context,
        )
