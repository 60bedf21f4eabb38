"""Multiple choice with a hint, as ScienceQA: which number does the scanned digit show?"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import NUMBER_NAMES, Split, digits, split_of
from delo_llava.mini.render import digit_image
from delo_llava.mini.tasks.base import Example, carriers, pick

LETTERS = ("A", "B", "C")
INSTRUCTIONS = (
    "which number is it? {options} answer with the letter",
    "pick the right number: {options} give its letter",
    "{options} what letter stands before the number?",
)
TOLD = ("hint: the number is {name}", "hint: a child wrote {name}", "hint: this is {name}")
NEUTRAL = ("hint: look at the picture", "hint: a child wrote it", "hint: it was scanned in a school")


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Three options in random order, the answer is a letter."""
    scans = [d for d in digits() if split_of("digit", d.key) == split]
    while True:
        digit = scans[int(rng.integers(len(scans)))]
        in_image, in_context = carriers(rng, image_only=0.45, both=0.25)
        others = [int(v) for v in rng.permutation(10) if v != digit.value][:2]
        options = [int(v) for v in rng.permutation([digit.value, *others])]
        listed = " ".join(f"{letter}. {NUMBER_NAMES[v]}" for letter, v in zip(LETTERS, options, strict=True))
        yield Example(
            image=digit_image(digit.scan, rng, hidden=not in_image),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(name=NUMBER_NAMES[digit.value]),
            instruction=pick(rng, INSTRUCTIONS).format(options=listed),
            answer=LETTERS[options.index(digit.value)],
            entity=f"digit/{digit.key}",
            in_image=in_image,
            in_context=in_context,
        )
