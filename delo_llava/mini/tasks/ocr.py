"""Reading a card with a transcript beside it, as TextVQA and OCR-VQA: which word is printed?"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import Split, split_of, words
from delo_llava.mini.render import letter_card
from delo_llava.mini.tasks.base import Example, carriers, pick

INSTRUCTIONS = ("read the word on the card", "what is printed here?", "write down what the card says")
TOLD = ("transcript: {word}", "somebody typed {word}", "the label says {word}")
NEUTRAL = ("transcript: none", "somebody will type it", "the label is old")


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """The answer is the word in capitals, as on the card."""
    vocabulary = [w for w in words() if split_of("word", w) == split]
    while True:
        word = pick(rng, vocabulary)
        in_image, in_context = carriers(rng, image_only=0.45, both=0.25)
        yield Example(
            image=letter_card(word, rng, hidden=not in_image),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(word=word.upper()),
            instruction=pick(rng, INSTRUCTIONS),
            answer=word.upper(),
            entity=f"word/{word}",
            in_image=in_image,
            in_context=in_context,
        )
