"""Kept aside: looking something up in a note, without a picture, as the base's pretraining asks.

Values are words of one split in capitals, coloured shapes and numbers; which of them is asked for, the
instruction says.
"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import COLOURS, FORMS, NUMBER_NAMES, Split, split_of, words
from delo_llava.mini.tasks.base import Example, pick

PEOPLE = ("tom", "ann", "ben", "eva", "max", "lea", "sam", "ida", "joe", "mia")
TOLD = ("{who} has {what}.", "{who} took {what}.", "{what} is for {who}.")
INSTRUCTIONS = ("what about {who}?", "{who} has what?", "tell me {who}'s.")


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Two or three people and what each has."""
    known = [word.upper() for word in words() if split_of("word", word) == split]
    while True:
        count = int(rng.integers(2, 4))
        people = [PEOPLE[int(i)] for i in rng.permutation(len(PEOPLE))[:count]]
        values = [_value(rng, known) for _ in people]
        asked, form = int(rng.integers(count)), pick(rng, TOLD)
        pairs = zip(people, values, strict=True)
        yield Example(
            image=None,
            context=" ".join(form.format(who=who, what=what) for who, what in pairs),
            instruction=pick(rng, INSTRUCTIONS).format(who=people[asked]),
            answer=values[asked],
            entity=f"note/{people[asked]} {values[asked]}",
            in_image=False,
            in_context=True,
        )


def _value(rng: Generator, known: list[str]) -> str:
    """A word, a coloured shape or a number."""
    match int(rng.integers(3)):
        case 0:
            return pick(rng, known)
        case 1:
            return f"{pick(rng, list(COLOURS))} {pick(rng, FORMS)}"
    return pick(rng, NUMBER_NAMES)
